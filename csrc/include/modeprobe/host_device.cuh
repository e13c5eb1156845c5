// One spelling for functions that both the host and the device compile.
#pragma once

#if !defined(MODEPROBE_HD)
#if defined(__CUDACC__)
#define MODEPROBE_HD __host__ __device__ __forceinline__
#else
#define MODEPROBE_HD inline
#endif
#endif
