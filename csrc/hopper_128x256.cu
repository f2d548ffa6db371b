#include "hopper_launch.cuh"

namespace laco {

using ThisTile = Tile<256, 4, 2>;

const char* forward_128x256(const Forward& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* input_gradient_128x256(const InputGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* weight_gradient_128x256(const WeightGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }

}  // namespace laco
