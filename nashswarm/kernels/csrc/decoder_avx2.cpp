#define LANES 8
#include "decoder_steps.h"

namespace nashswarm {
const DecoderSteps decoder_avx2 = STEPS_OF_SET;
}  // namespace nashswarm
