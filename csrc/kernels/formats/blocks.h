// Weights in quantized blocks, multiplied as they are stored; see blocks.cpp.
#pragma once

#include "../kernels.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// See FormatKernels.
void pack_blocks(PackedWeight& weight, const void* source, Type type, int64_t rows, int64_t first, int64_t part, int64_t parts);
void multiply_blocks(const LinearCall& call);
void look_up_blocks(const PackedWeight& weight, int64_t output, float factor, float* out);

// Rows of blocks as a file has them.
void look_up_rows(const PackedWeight& weight, int64_t row, float factor, float* out);

}  // namespace GOSSAMER_NS
