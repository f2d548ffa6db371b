#include "hopper_launch.cuh"

const char* laco::launch_128x256(const GemmProblem& problem, cudaStream_t stream) { return launch<Tile<256, 4, 2>>(problem, stream); }
