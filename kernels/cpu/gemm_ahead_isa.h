// What a register tile brings into cache for those after it, while it multiplies: the next panel
// and the next rows, turn by turn of its steps. For gemm_tile_isa.h.
#pragma once

#include "cpu/gemm_step_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Lines that are fetched ahead: one or two every step, `second` apart, for kFetchSteps steps at a
// time, in `turns` of `slots`, evenly.
constexpr int64_t kFetchSteps = 16;  // turns of 8 cost up to 4 % under AVX2
static_assert(kFetchSteps >= kRows && kFetchSteps % 4 == 0);  // a tile's rows, whole unrolled turns
// The steps of a turn. A short tap among others is one: a stem's 33 take longer in 16 + 16 + 1.
constexpr int64_t steps_of_turn(int64_t taps, int64_t count) {
  constexpr int64_t short_tap = 48;
  return taps > 1 && count <= short_tap ? short_tap : kFetchSteps;
}
template <class T>
struct Ahead {
  const T* at = nullptr;
  int64_t second = 0, stride = 0, advance = 0;
  int64_t turns = 0;  // that are left
  int64_t all = 0, slots = 0, credit = 0;
  // Turns across some rows, how many of them are left, and how far on the next rows are. 0: there
  // are no such rows.
  int64_t across = 0, left = 0, down = 0;

  // The next panel's part of a chunk: at batch 1 a network reads its weights from memory. Spread
  // over the panel's `rows`: a core waits for 16 lines at a time at most, and as many come from
  // afar in 200 cycles, 14 steps.
  static NNARCH_INLINE Ahead next_panel(const Panel<T>& p, int64_t rows) {
    const Later<T>& next = p.next;
    if (!next.at || next.size <= 0 || next.rows <= 0) return {};
    const int64_t tiles = (rows + kRows - 1) / kRows;
    const int64_t taps = p.chunk.last_tap - p.chunk.first_tap,
                  steps = steps_of_turn(taps, p.chunk.count),
                  in_tile = taps * ((p.chunk.count + steps - 1) / steps);
    // A tile's first turn is that of C's lines; the next rows take every other one.
    const int64_t all = tiles * (in_tile > 1 ? in_tile - 1 : 1),
                  slots = p.meets_rows ? all / 2 : all;
    if (next.rows > 1 && next.step != next.size) return next_rows_of(next, slots);
    const int64_t size = next.rows * next.size;
    const int64_t each = slots * kFetchSteps * kLine<T> >= size ? 1 : 2;
    const int64_t turn = kFetchSteps * each * kLine<T>, turns = (size + turn - 1) / turn;
    return {next.at, (each - 1) * kLine<T>, each * kLine<T>, turn, turns, turns, slots * 7 / 8};
  }
  // Two lines of each of 16 rows in a turn, from left to right, then the rows below.
  static NNARCH_INLINE Ahead next_rows_of(const Later<T>& next, int64_t slots) {
    const int64_t two = 2 * kLine<T>, across = (next.size + two - 1) / two,
                  turns = across * ((next.rows + kFetchSteps - 1) / kFetchSteps);
    Ahead ahead{next.at, kLine<T>, next.step, two, turns, turns, slots * 7 / 8};
    ahead.across = ahead.left = across;
    ahead.down = kFetchSteps * next.step - across * two;
    return ahead;
  }
  // The rows of the next tile: a matrix product meets each row of A first in its first panel, and
  // straight from memory.
  static NNARCH_INLINE Ahead next_rows(int64_t count, int64_t step, const T* a) {
    return {a, kLine<T>, step, 2 * kLine<T>, (count + 2 * kLine<T> - 1) / (2 * kLine<T>)};
  }
  NNARCH_INLINE bool is_due() {
    if (turns <= 0) return false;
    credit += all;
    if (credit < slots) return false;
    credit -= slots;
    return true;
  }
  NNARCH_INLINE EvenLines<T> turn() {
    const EvenLines<T> lines{at, stride};
    at += advance, --turns;
    if (--left == 0) at += down, left = across;
    return lines;
  }
};

}  // namespace
}  // namespace nnarch::NNARCH_ISA
