// The table of capsule routing.
#include "capsule_routing/gradient_isa.h"
#include "capsule_routing/iteration_isa.h"
#include "capsule_routing/lanes_isa.h"
#include "capsule_routing/order_isa.h"
#include "cpu/transpose_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
constexpr RoutingTable<T> kTable = {
    kLanes<T>,           kLaneCapsules,
    transpose_matrix<T>, copy_rows<T>,
    votes_of_block<T>,   total<T>,
    iteration<T>,        iteration_grad<T>,
    softmax<T>,          grad_of_block<T>,
    to_lanes<T>,         lane_sums<T>,
    lane_iteration<T>,   lane_iteration_grad<T>,
    lane_outputs<T>,
};

}  // namespace

template <>
const RoutingTable<float>& routing_table<float>() {
  return kTable<float>;
}
template <>
const RoutingTable<double>& routing_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
