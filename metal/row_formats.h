// What quantize_rows and dequantize_rows share: the forms in which rows travel.
#pragma once
#include "common.h"

enum RowForm { INT8 = 0, MXFP8 = 1 };

// Bits of float magnitudes: below 2^-100 a group is zero, from infinity on it is NaN.
enum Magnitude : uint { SMALLEST = 27u << 23, INFINITE = 255u << 23, NOT_A_NUMBER = 0x7fc00000u };
