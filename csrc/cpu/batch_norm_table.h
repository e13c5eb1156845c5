// The table of one instruction set; included after all loops.

// Half of the kinds on narrow registers, where a pack is four of them: the others took a minute to compile.
constexpr bool kFewKinds = MODEPROBE_ISA_WIDTH == 128;

#define MODEPROBE_BY_KIND(name, ...)                       \
  switch (kind_of(a)) {                                    \
    case kPlain:                                           \
      name<kPlain, T>(__VA_ARGS__);                        \
      break;                                               \
    case kReluAlone:                                       \
      name<kFewKinds ? kAny : kReluAlone, T>(__VA_ARGS__); \
      break;                                               \
    case kAddRelu:                                         \
      name<kFewKinds ? kAny : kAddRelu, T>(__VA_ARGS__);   \
      break;                                               \
    default:                                               \
      name<kAny, T>(__VA_ARGS__);                          \
  }

template <class T>
void plane_normalize(const Normalize<T>& a, Planes t) {
  MODEPROBE_BY_KIND(plane_normalize_as, a, t)
  if (a.stream) fence();
}
template <class T>
void row_normalize(const Normalize<T>& a, Rows t) {
  MODEPROBE_BY_KIND(row_normalize_as, a, t)
  if (a.stream) fence();
}
template <class T>
void plane_backward_reduce(const Backward<T>& a, Planes t, double* sum, double* dot) {
  MODEPROBE_BY_KIND(plane_backward_reduce_as, a, t, sum, dot)
}
template <class T>
void row_backward_reduce(const Backward<T>& a, Rows t, double* sum, double* dot) {
  MODEPROBE_BY_KIND(row_backward_reduce_as, a, t, sum, dot)
}
template <class T>
void plane_backward_input(const Backward<T>& a, Planes t) {
  MODEPROBE_BY_KIND(plane_backward_input_as, a, t)
  if (a.stream) fence();
}
template <class T>
void row_backward_input(const Backward<T>& a, Rows t) {
  MODEPROBE_BY_KIND(row_backward_input_as, a, t)
  if (a.stream) fence();
}
#undef MODEPROBE_BY_KIND

template <class T>
constexpr KernelTable<T> table() {
  return {plane_moments<T>,         row_moments<T>,         plane_normalize<T>,      row_normalize<T>,
          plane_backward_reduce<T>, row_backward_reduce<T>, plane_backward_input<T>, row_backward_input<T>};
}

static constexpr Kernels kKernels = {table<float>(), table<double>(), table<Half>(), table<BFloat>()};
