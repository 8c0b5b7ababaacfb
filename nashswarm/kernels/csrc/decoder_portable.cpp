#define LANES 4
#include "mixture_steps.h"

namespace nashswarm {
const DecoderSteps decoder_portable = STEPS_OF_SET;
const MixtureSteps mixture_portable = MIXTURE_OF_SET;
}  // namespace nashswarm
