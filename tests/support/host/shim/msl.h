// The Metal standard library, as far as the kernels need it. Every <metal_*> header is
// this one. A function that is missing here is a compile error, never a silent gap.
#pragma once
#ifdef MSL_LINT
#include "msl_lint.h"
#else
#include "msl_types.h"
#include "msl_math.h"
#include "msl_sync.h"
// libc++ has functions of these names where MLX's utils.h defines its own.
#define log1p mlx_log1p
#define hypot mlx_hypot
// Address spaces and restrict: last, so that no C++ header sees them as macros.
#define device
#define constant
#define thread
#define threadgroup
#endif
