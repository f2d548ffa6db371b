#include "hopper_launch.cuh"

const char* laco::launch_192x128(const GemmProblem& problem, cudaStream_t stream) { return launch<Tile<128, 4, 3>>(problem, stream); }
