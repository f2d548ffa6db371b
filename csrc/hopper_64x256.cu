#include "hopper_launch.cuh"

namespace laco {

using ThisTile = Tile<256, 5, 1>;

const char* forward_64x256(const Forward& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* input_gradient_64x256(const InputGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* weight_gradient_64x256(const WeightGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }

}  // namespace laco
