// The transforms of tiles at the ends of lines; winograd.h says of which.
#include "conv2d/winograd.h"

#include "conv2d/winograd_transforms_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// A row's end has S columns of outputs, a column's end S rows, and the corner both.
template <int S>
constexpr WinogradEnds kEnds = {{spread_channels<InputMatrix<4, 3>, InputMatrix<4, 3, S>>,
                                 spread_channels<InputMatrix<4, 3, S>, InputMatrix<4, 3>>,
                                 spread_channels<InputMatrix<4, 3, S>, InputMatrix<4, 3, S>>},
                                {output_channels<OutputMatrix<4, 3>, OutputMatrix<4, 3, S>>,
                                 output_channels<OutputMatrix<4, 3, S>, OutputMatrix<4, 3>>,
                                 output_channels<OutputMatrix<4, 3, S>, OutputMatrix<4, 3, S>>},
                                {spread_channels<GradMatrix<4, 3>, GradMatrix<4, 3, S>>,
                                 spread_channels<GradMatrix<4, 3, S>, GradMatrix<4, 3>>,
                                 spread_channels<GradMatrix<4, 3, S>, GradMatrix<4, 3, S>>}};

}  // namespace

const WinogradEnds& winograd_ends_table(int64_t outputs) {
  return outputs == 1 ? kEnds<1> : outputs == 2 ? kEnds<2> : kEnds<3>;
}

}  // namespace nnarch::NNARCH_ISA
