// Rows of few classes stand side by side, one a lane; a row of many classes lies along the lanes. Included once per
// instruction set.
namespace bertops::BERTOPS_ISA {

constexpr int64_t kFewClasses = 32;
constexpr int64_t kSumTogether = 64;  // vectors that one partial sum adds up: long sums keep their digits

template <class T>
using Places = decltype(Vec<T>{} == Vec<T>{});  // integers of the size of T

template <class T>
BERTOPS_INLINE Places<T> place_of(int64_t c) {
  if constexpr (sizeof(T) == 4) {
    return Places<T>{} + static_cast<int32_t>(c);
  } else {
    return Places<T>{} + c;
  }
}

// The largest element of every lane and where it stands, the first of equals; NaN is passed over.
template <class T>
struct Largest {
  Vec<T> value;
  Places<T> place;

  BERTOPS_INLINE void see(Vec<T> z, Places<T> at) {
    const Places<T> larger = z > value;
    value = larger ? z : value;
    place = larger ? at : place;
  }

  BERTOPS_INLINE void join(const Largest& other) {
    const Places<T> earlier = (other.value == value) & (other.place < place);
    const Places<T> wins = (other.value > value) | earlier;
    value = wins ? other.value : value;
    place = wins ? other.place : place;
  }
};

// As torch.argmax has it, NaN is larger than any number: where the first of `count` elements stands, else `place`.
template <class T>
inline int64_t first_nan(const T* z, int64_t stride, int64_t count, int64_t place) {
  for (int64_t c = 0; c < count; ++c) {
    if (z[c * stride] != z[c * stride]) return c;
  }
  return place;
}

template <class T>
BERTOPS_INLINE Largest<T> none_seen() {
  return {broadcast(static_cast<T>(-__builtin_inf())), Places<T>{}};
}

template <class T>
struct RowSums {
  Vec<T> rest, weighted;

  BERTOPS_INLINE void add(Vec<T> z, Places<T> at, const Largest<T>& largest) {
    const EntropyTerm<Vec<T>> term = entropy_term(z - largest.value);
    rest += at == largest.place ? Vec<T>{} : term.power;
    weighted += term.weighted;
  }
};

// ---- few classes: block[c][lane]

template <class T, class S>
inline void load_block(const S* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t classes,
                       T* block) {
  int64_t done = 0;
  if constexpr (__is_same(S, T)) {
    if (stride == 1 && rows == kLanes<T>) {
      done = classes / kLanes<T> * kLanes<T>;
      transpose(from, row_stride, rows, done, block, kLanes<T>);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = done; c < classes; ++c) {
      block[c * kLanes<T> + row] = to_float(from[row * row_stride + c * stride]);
    }
  }
  for (int64_t row = rows; row < kLanes<T>; ++row) {
    for (int64_t c = done; c < classes; ++c) block[c * kLanes<T> + row] = 0;
  }
}

template <class T, class S>
inline void store_block(const T* block, int64_t rows, int64_t classes, S* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < classes; ++c) from_float(block[c * kLanes<T> + row], to + row * classes + c);
  }
}

template <class T, class S>
inline void few_classes(const EntropyRows& p, int64_t first, int64_t last, T* block) {
  const S* logits = static_cast<const S*>(p.logits);
  const T unit = static_cast<T>(p.unit), top = static_cast<T>(p.largest());
  for (int64_t row = first; row < last; row += kLanes<T>) {
    const int64_t rows = min_of(kLanes<T>, last - row);
    load_block(logits + row * p.row_stride, p.row_stride, p.stride, rows, p.classes, block);
    Largest<T> largest = none_seen<T>(), second = none_seen<T>();  // two chains of comparisons, not one
    for (int64_t c = 0; c < p.classes; c += 2) largest.see(load(block + c * kLanes<T>), place_of<T>(c));
    for (int64_t c = 1; c < p.classes; c += 2) second.see(load(block + c * kLanes<T>), place_of<T>(c));
    largest.join(second);
    RowSums<T> sums = {};
    for (int64_t c = 0; c < p.classes; ++c) sums.add(load(block + c * kLanes<T>), place_of<T>(c), largest);
    if (p.grad_logits == nullptr) {
      const Vec<T> nats = entropy_of(largest.value, sums.rest, sums.weighted);
      const Vec<T> result = p.bounded ? uncertainty_of(nats, unit, top) : nats * unit;
      for (int64_t lane = 0; lane < rows; ++lane) {
        static_cast<T*>(p.entropy)[row + lane] = result[lane];
        if (p.prediction == nullptr) continue;
        const int64_t place = largest.place[lane];
        p.prediction[row + lane] =
            result[lane] == result[lane] ? place : first_nan(block + lane, kLanes<T>, p.classes, place);
      }
      continue;
    }
    Vec<T> grad{};
    for (int64_t lane = 0; lane < rows; ++lane) {
      grad[lane] = static_cast<const T*>(p.grad)[(row + lane) * p.grad_stride] * unit;
    }
    for (int64_t c = 0; c < p.classes; ++c) {
      const EntropyTerm<Vec<T>> term = entropy_term(load(block + c * kLanes<T>) - largest.value);
      store(block + c * kLanes<T>, grad * entropy_grad(term, largest.value, sums.rest, sums.weighted));
    }
    store_block(block, rows, p.classes, static_cast<S*>(p.grad_logits) + row * p.classes);
  }
}

// ---- many classes: a row in scratch, -inf up to a full vector

// The first of the largest elements over all lanes, in every lane.
template <class T>
BERTOPS_INLINE Largest<T> over_lanes(const Largest<T>& lanes) {
  int best = 0;
  for (int lane = 1; lane < kLanes<T>; ++lane) {
    const T z = lanes.value[lane], other = lanes.value[best];
    if (z > other || (z == other && lanes.place[lane] < lanes.place[best])) best = lane;
  }
  return {broadcast(lanes.value[best]), Places<T>{} + lanes.place[best]};
}

template <class T>
inline void many_classes(const EntropyRows& p, int64_t first, int64_t last, T* scratch) {
  const T unit = static_cast<T>(p.unit), top = static_cast<T>(p.largest());
  const int64_t padded = round_up(p.classes, kLanes<T>);
  Places<T> lane_places{};
  for (int lane = 0; lane < kLanes<T>; ++lane) lane_places[lane] = lane;
  for (int64_t row = first; row < last; ++row) {
    load_as(p.dtype, p.logits, row * p.row_stride, p.stride, p.classes, p.classes, T(1), scratch);
    for (int64_t c = p.classes; c < padded; ++c) scratch[c] = static_cast<T>(-__builtin_inf());
    Largest<T> lanes = none_seen<T>();
    for (int64_t c = 0; c < padded; c += kLanes<T>)
      lanes.see(load(scratch + c), lane_places + place_of<T>(c));
    const Largest<T> largest = over_lanes(lanes);
    RowSums<T> sums = {};
    for (int64_t start = 0; start < padded; start += kSumTogether * kLanes<T>) {
      const int64_t end = min_of(padded, start + kSumTogether * kLanes<T>);
      RowSums<T> part = {};
      for (int64_t c = start; c < end; c += kLanes<T>)
        part.add(load(scratch + c), lane_places + place_of<T>(c), largest);
      sums.rest += part.rest;
      sums.weighted += part.weighted;
    }
    const Vec<T> rest = broadcast(sum_of<T>(sums.rest)), weighted = broadcast(sum_of<T>(sums.weighted));
    if (p.grad_logits == nullptr) {
      const Vec<T> nats = entropy_of(largest.value, rest, weighted);
      const T result = (p.bounded ? uncertainty_of(nats, unit, top) : nats * unit)[0];
      static_cast<T*>(p.entropy)[row] = result;
      if (p.prediction == nullptr) continue;
      const int64_t place = largest.place[0];
      p.prediction[row] = result == result ? place : first_nan(scratch, 1, p.classes, place);
      continue;
    }
    const Vec<T> grad = broadcast(static_cast<const T*>(p.grad)[row * p.grad_stride] * unit);
    for (int64_t c = 0; c < padded; c += kLanes<T>) {
      const EntropyTerm<Vec<T>> term = entropy_term(load(scratch + c) - largest.value);
      store(scratch + c, grad * entropy_grad(term, largest.value, rest, weighted));
    }
    store_as(p.dtype, scratch, p.classes, T(1), p.grad_logits, row * p.classes);
  }
}

// Rows [first, last), with scratch for round_up(classes, kLanes<T>) elements, or a block of rows of few classes.
template <class T>
void entropy_part(const EntropyRows& p, int64_t first, int64_t last, void* scratch) {
  T* memory = static_cast<T*>(scratch);
  if (p.classes > kFewClasses) return many_classes<T>(p, first, last, memory);
  switch (p.dtype) {
    case DType::kFloat: return few_classes<T, float>(p, first, last, memory);
    case DType::kDouble: return few_classes<T, double>(p, first, last, memory);
    case DType::kBFloat16: return few_classes<T, BFloat16>(p, first, last, memory);
    case DType::kFloat16: return few_classes<T, Float16>(p, first, last, memory);
  }
}

}  // namespace bertops::BERTOPS_ISA
