// One tile of the test program: compiled once for each, with its name and type given by the build script.
#include "hopper_launch.cuh"
#include "test_hopper.h"

using Chosen = laco::LACO_TILE;
static RegisterVariant registered({LACO_NAME, Chosen::BM, Chosen::BN, Chosen::STAGES, Chosen::CLUSTER, laco::launch<Chosen>});
