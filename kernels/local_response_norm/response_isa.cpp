// The table of local response normalization: windows of 3 and 5 channels have kernels of their own.
#include "local_response_norm/planes_isa.h"
#include "local_response_norm/rows_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Calls f(PowerIs<power>{}, Code<half>{}) for a window of `half` channels on both sides, 1 or 2.
template <int value>
struct Half {
  static constexpr int half = value;
};

template <class T, class F, class G>
NNARCH_INLINE void with_window(const Response<T>& a, bool special, const F& f, const G& any) {
  special = special && a.before == a.after && (a.before == 1 || a.before == 2);
  with_power(a.power, [&](auto p) NNARCH_INLINE_LAMBDA {
    if (!special) return any(p);
    return a.before == 1 ? f(p, Half<1>{}) : f(p, Half<2>{});
  });
}

// Whether vectors fill the pixels and groups the channels.
template <class T>
bool groups_serve(const Response<T>& a, int64_t pixels) {
  return pixels >= kLanes<T> && a.channels >= kGroup;
}

template <class T>
void forward_planes(const T* x, int64_t plane, int64_t pixels, const Response<T>& a, T* y) {
  with_window(
      a, groups_serve(a, pixels),
      [&](auto p, auto h) {
        forward_planes_of<T, h.half, h.half, p.power>(x, plane, pixels, a, y);
      },
      [&](auto p) { forward_planes_any<T, p.power>(x, plane, pixels, a, y); });
}

template <class T>
void grad_planes(const T* grad, const T* x, int64_t plane, int64_t pixels, const Response<T>& a,
                 T* scratch, T* dx) {
  with_window(
      a, groups_serve(a, pixels),
      [&](auto p, auto h) {
        grad_planes_of<T, h.half, h.half, p.power>(grad, x, plane, pixels, a, scratch, dx);
      },
      [&](auto p) { grad_planes_any<T, p.power>(grad, x, plane, pixels, a, scratch, dx); });
}

template <class T>
void forward_rows(const T* x, int64_t pixels, const Response<T>& a, T* scratch, T* y,
                  bool past_caches) {
  with_window(
      a, true,
      [&](auto p, auto h) {
        forward_rows_of<T, h.half, h.half, p.power>(x, pixels, a, y, past_caches);
      },
      [&](auto p) { forward_rows_any<T, p.power>(x, pixels, a, scratch, y); });
}

template <class T>
void grad_rows(const T* grad, const T* x, int64_t pixels, const Response<T>& a, T* scratch, T* dx,
               bool past_caches) {
  with_window(
      a, true,
      [&](auto p, auto h) {
        grad_rows_of<T, h.half, h.half, p.power>(grad, x, pixels, a, scratch, dx, past_caches);
      },
      [&](auto p) { grad_rows_any<T, p.power>(grad, x, pixels, a, scratch, dx); });
}

template <class T>
constexpr ResponseTable<T> kTable = {forward_planes<T>, grad_planes<T>, forward_rows<T>,
                                     grad_rows<T>};

}  // namespace

template <>
const ResponseTable<float>& response_table<float>() {
  return kTable<float>;
}
template <>
const ResponseTable<double>& response_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
