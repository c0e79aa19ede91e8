// Rows in groups of 32 elements. dequant.cpp includes this file once for each instruction set, inside a namespace and a
// `#pragma GCC target` of its own; so it has no include guard and no #include. The namespace has defined before it:
//   Floats                              32 float32
//   floats<C>(codes)                    f32, bf16, int8, fp8: 32 values
//   levels<C>()                         int4r, int2r: the levels, repeated
//   times(Floats, scale)                float32 products
//   times_double(Floats, factor)        float64 products, rounded to float32
//   put<T, Stream>(out, Floats)         rounds and stores
//   Lookup<T>(table)                    its put<C, Stream>(out, codes) stores table[code] for 32 codes
//   Squares, add_squares                sums of squares in 16 float64 lanes: element c in lane c % 16

// A step is at least 64 bytes of codes, whole groups; a line of `ahead` is prefetched for every 64 bytes.
template <Codec C>
constexpr int64_t kGroup = 4 * kBits<C>;  // bytes of 32 codes
template <Codec C>
constexpr int64_t kStep = kGroup<C> < 64 ? 64 : kGroup<C>;

// Calls each(codes, c) for every whole group of the row. Returns the number of elements in them.
template <Codec C, typename Each>
inline __attribute__((always_inline)) int64_t groups(const uint8_t* codes, int64_t dim, const uint8_t* ahead,
                                                     Each each) {
  constexpr int64_t elements = kStep<C> / kGroup<C> * 32;
  int64_t c = 0;
  for (; c + elements <= dim; c += elements) {
    for (int64_t k = 0; k < kStep<C>; k += 64) prefetch_row(ahead + k);
    ahead += kStep<C>;
#pragma GCC unroll 8
    for (int64_t g = 0; g < kStep<C> / kGroup<C>; ++g, codes += kGroup<C>) each(codes, c + 32 * g);
  }
  if (c < dim) prefetch_row(ahead);
  for (; c + 32 <= dim; c += 32, codes += kGroup<C>) each(codes, c);
  return c;
}

template <Codec C, Element T, bool Stream>
void row(const uint8_t* codes, float scale, void* to, int64_t dim, const uint8_t* ahead) {
  auto* out = static_cast<uint8_t*>(to);
  scale = one_nan<C>(scale);
  int64_t done;
  if constexpr (C == Codec::int4r || C == Codec::int2r) {
    alignas(64) Stored<T> table[32];
    put<T, false>(table, times(levels<C>(), scale));
    const Lookup<T> lookup(table);
    done = groups<C>(codes, dim, ahead, [&](const uint8_t* from, int64_t c) __attribute__((always_inline)) {
      lookup.template put<C, Stream>(out + c * sizeof(Stored<T>), from);
    });
  } else {
    done = groups<C>(codes, dim, ahead, [&](const uint8_t* from, int64_t c) __attribute__((always_inline)) {
      if constexpr (kScaled<C>)
        put<T, Stream>(out + c * sizeof(Stored<T>), times(floats<C>(from), scale));
      else
        put<T, Stream>(out + c * sizeof(Stored<T>), floats<C>(from));
    });
  }
  tail<C, T>(codes, scale, out, done, dim);
}

template <Codec C, Element T, bool Stream>
void unit_row(const uint8_t* codes, float, void* out, int64_t dim, const uint8_t* ahead) {
  if constexpr (kInteger<C>) {
    row<C, T, Stream>(codes, unit_factor(sum_of_squares<C>(codes, dim)), out, dim, ahead);
  } else {
    alignas(64) double lanes[16];
    Squares squares{};
    const int64_t done = groups<C>(codes, dim, ahead, [&](const uint8_t* from, int64_t)
                                   __attribute__((always_inline)) { add_squares(squares, floats<C>(from)); });
    squares.get(lanes);
    const double length2 = finish_squares<C>(lanes, codes, done, dim);
    if (length2 != length2) return fill_nan<T>(out, dim);
    const double factor = unit_factor_double(length2);
    groups<C>(codes, dim, codes, [&](const uint8_t* from, int64_t c) __attribute__((always_inline)) {
      put<T, Stream>(static_cast<uint8_t*>(out) + c * sizeof(Stored<T>), times_double(floats<C>(from), factor));
    });
    unit_tail<C, T>(codes, factor, out, done, dim);
  }
}

template <Codec C, Element T>
RowKernel pick(bool normalize, bool stream) {
  if (normalize) return stream ? unit_row<C, T, true> : unit_row<C, T, false>;
  return stream ? row<C, T, true> : row<C, T, false>;
}

template <Element T>
RowKernel pick(Codec codec, bool normalize, bool stream) {
  return with_codec(codec, [&](auto c) { return pick<c(), T>(normalize, stream); });
}

RowKernel pick(Codec codec, Element type, bool normalize, bool stream) {
  if (type == Element::f32) return pick<Element::f32>(codec, normalize, stream);
  if (type == Element::bf16) return pick<Element::bf16>(codec, normalize, stream);
  return pick<Element::f16>(codec, normalize, stream);
}
