#include "hopper_launch.cuh"

namespace laco {

using ThisTile = Tile<96, 4, 3, true>;

const char* forward_192x96(const Forward& q, const Launch& how) { return launch<ThisTile>(q, how); }

}  // namespace laco
