#define LANES 8
#include "mixture_steps.h"

namespace nashswarm {
const DecoderSteps decoder_avx2 = STEPS_OF_SET;
const MixtureSteps mixture_avx2 = MIXTURE_OF_SET;
}  // namespace nashswarm
