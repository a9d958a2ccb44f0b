// Attention of prompts by widths of keys and values: in the cache, and row after row.
#include "flash/cuda/prompt.cuh"

#define PROMPT(name, ...)                                                                                               \
    extern "C" __global__ void __launch_bounds__(prompt::__VA_ARGS__::kThreads, 1) name(const __grid_constant__ prompt::Params p) { \
        prompt::attend<prompt::__VA_ARGS__>(p);                                                                         \
    }
PROMPT(gqa_prompt_128, Shape<128, 128, 2, true>)
// Softmax takes the longer where heads are narrow, so more warpgroups share a step's keys.
PROMPT(gqa_prompt_64, Shape<64, 64, 3, true>)
PROMPT(mla_prompt, Shape<192, 128, 2, false>)
