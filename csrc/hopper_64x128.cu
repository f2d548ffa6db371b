#include "hopper_launch.cuh"

namespace laco {

using ThisTile = Tile<128, 8, 1, true>;

const char* forward_64x128(const Forward& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* input_gradient_64x128(const InputGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* weight_gradient_64x128(const WeightGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }

}  // namespace laco
