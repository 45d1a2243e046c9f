#pragma once  // instead of MLX's header of __metal_* builtins: msl_math.h has bfloat
