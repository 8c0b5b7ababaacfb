#define LANES 16
#include "mixture_steps.h"

namespace nashswarm {
const DecoderSteps decoder_avx512 = STEPS_OF_SET;
const MixtureSteps mixture_avx512 = MIXTURE_OF_SET;
}  // namespace nashswarm
