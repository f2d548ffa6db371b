#include "hopper_launch.cuh"

namespace laco {

using ThisTile = Tile<128, 4, 3, true>;

int clusters_at_once(int blocks) {
  return clusters_of<Kernel<ThisTile, Element::bfloat16, Product::forward, Activation::none, false, true>>(blocks);
}

const char* forward_192x128(const Forward& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* input_gradient_192x128(const InputGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }
const char* weight_gradient_192x128(const WeightGradient& q, const Launch& how) { return launch<ThisTile>(q, how); }

}  // namespace laco
