#pragma once

#include <string>

namespace emulated {

void run_machine_kernel(const std::string& name, const float* x, float* out, unsigned blocks,
                        unsigned threads, bool cooperative);

}  // namespace emulated
