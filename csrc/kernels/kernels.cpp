// The table of one instruction set: CMakeLists.txt compiles this file once for each, with GOSSAMER_NS naming a namespace.
//
// Whatever this includes (all of csrc/kernels) stands in that namespace and uses no template of the standard library, nor
// any other function with external linkage that is compiled on the spot: the linker would keep one copy of each for all
// instruction sets, perhaps one that this processor cannot run. What is compiled once, for every processor, is in
// csrc/runtime and csrc/products. A kernel is added as a header here, a field of Kernels, and a line below; a
// weight format as a header in formats/, a value of Format, and an entry of the line below.
#include "attention_within.h"
#include "formats/blocks.h"
#include "formats/floating.h"
#include "formats/int8.h"
#include "formats/sparse_int8.h"
#include "gaussian.h"
#include "gradients.h"
#include "linear.h"
#include "sample.h"
#include "states.h"

namespace GOSSAMER_NS {

#define GOSSAMER_TEXT_(x) #x
#define GOSSAMER_TEXT(x) GOSSAMER_TEXT_(x)

extern const gossamer::Kernels kernels;
const gossamer::Kernels kernels = {
    .name = GOSSAMER_TEXT(GOSSAMER_NS),
    .formats = {kernels_of<Int8Format>(), kernels_of<SparseFormat>(), kernels_of<Bf16Format>(), kernels_of<FloatFormat>(),
                {.type = Type::int8_blocks, .pack = pack_blocks, .multiply = multiply_blocks, .look_up = look_up_blocks},
                {.type = Type::int8_blocks, .look_up = look_up_rows}},
    .prepare = prepare,
    .square_sum = square_sum,
    .attend = attend,
    .attend_within = attend_within,
    .rotate = rotate,
    .convert = convert,
    .quantize = quantize,
    .merge = merge,
    .join = join,
    .layer_norm = layer_norm,
    .activate = activate_row,
    .gated = gated,
    .convolve = convolve,
    .recur = recur,
    .gate_by = gate_by,
    .cap = cap,
    .scale_row = scale_row,
    .argmax = argmax,
    .sample = sample,
    .dot_rows = dot_rows,
    .combine_rows = combine_rows,
    .gram = gram,
    .gaussian = gaussian,
};

}  // namespace GOSSAMER_NS
