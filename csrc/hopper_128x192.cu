#include "hopper_launch.cuh"

namespace laco {

using ThisTile = Tile<192, 4, 2>;

const char* forward_128x192(const Forward& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* input_gradient_128x192(const InputGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* weight_gradient_128x192(const WeightGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }

}  // namespace laco
