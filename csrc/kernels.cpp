// Compiled once per instruction set; see CMakeLists.txt.
#include "attention_within.h"
#include "gaussian.h"
#include "gradients.h"
#include "sample.h"

namespace GOSSAMER_NS {

#define GOSSAMER_TEXT_(x) #x
#define GOSSAMER_TEXT(x) GOSSAMER_TEXT_(x)

extern const gossamer::Kernels kernels;
const gossamer::Kernels kernels = {
    GOSSAMER_TEXT(GOSSAMER_NS), pack, prepare, square_sum, linear, attend, attend_within, rotate, convert, quantize, merge,
    scale_row, argmax, sample, dot_rows, combine_rows, gram, gaussian,
};

}  // namespace GOSSAMER_NS
