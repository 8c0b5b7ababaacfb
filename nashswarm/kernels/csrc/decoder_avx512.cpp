#define LANES 16
#include "decoder_steps.h"

namespace nashswarm {
const DecoderSteps decoder_avx512 = STEPS_OF_SET;
}  // namespace nashswarm
