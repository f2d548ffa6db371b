#include "hopper_launch.cuh"

namespace laco {

using ThisTile = Tile<144, 4, 3>;

const char* forward_192x144(const Forward& q, const Launch& how) { return launch<ThisTile>(q, how); }

}  // namespace laco
