// The types of the driver's functions that csrc asks for by name.
#pragma once

#include "cuda.h"

using PFN_cuTensorMapEncodeTiled_v12000 = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* address,
                                                       const cuuint64_t* sizes, const cuuint64_t* strides,
                                                       const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                                       CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
using PFN_cuTensorMapEncodeIm2col_v12000 = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* address,
                                                        const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower,
                                                        const int* upper, cuuint32_t channels, cuuint32_t pixels,
                                                        const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                                        CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
