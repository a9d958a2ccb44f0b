// What the copy engine is told of a tensor, made on the host: a CUtensorMap, without the driver's header.
#pragma once
#include <cstdint>

struct alignas(128) TensorMap {
    uint64_t opaque[16];
};
