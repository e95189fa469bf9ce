/* The one translation unit that compiles slam.h: by nvcc, or by any C or C++ compiler (cc -x c -c slam.cu). */
#define SLAM_IMPLEMENTATION
#include "slam.h"
