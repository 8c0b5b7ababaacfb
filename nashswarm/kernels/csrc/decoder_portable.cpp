#define LANES 4
#include "decoder_steps.h"

namespace nashswarm {
const DecoderSteps decoder_portable = STEPS_OF_SET;
}  // namespace nashswarm
