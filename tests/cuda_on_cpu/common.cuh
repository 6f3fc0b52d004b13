// common.cuh: what stands for kernels/common.cuh on a CPU.
#pragma once
#include "emulated.h"
