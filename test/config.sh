#!/bin/sh
# Finds what is installed and prints it as make variables. The Makefile runs it once per build folder, with its variables and the
# folder B in the environment; `make clean` makes it run again.
found='' missing='' flags='' libs='' cuda='' nccl='' nccl_libs='' mpirun=''

wanted() { # wanted NAME: not in WITHOUT
    case " $WITHOUT " in *" $1 "*) missing="$missing, without $1"; return 1 ;; esac
}
try() { # try PROGRAM FLAGS...: does it compile and link without a warning?
    printf '%s\n' "$1" >"$B/try.c"
    shift
    $CC -Werror $CFLAGS "$B/try.c" -o "$B/try" "$@" $LDFLAGS >"$B/config.log" 2>&1
}
first_of() { # first_of PROGRAM 'FLAGS' ...: the first flags with which it compiles, in $use
    first_program=$1
    shift
    for use; do try "$first_program" $use && return; done
    use=
    return 1
}

use() { # use NAME: adds the flags in $use and says what was found
    found="$found, $1"
    for word in $use; do
        case $word in -l* | -L* | -Wl,* | -framework | Accelerate) libs="$libs $word" ;; *) flags="$flags $word" ;; esac
    done
}

if [ -z "$CFLAGS" ]; then
    case $($CC -dumpmachine) in aarch64* | arm64*) native=-mcpu=native ;; *) native=-march=native ;; esac
    try 'int main(void) { return 0; }' $native || native=
    if [ "$SANITIZE" ]; then CFLAGS="-O1 -g $native"; else CFLAGS="-O3 $native"; fi
fi
[ -z "$SANITIZE" ] || CFLAGS="$CFLAGS -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
if ! try 'int main(void) { return 0; }'; then
    echo "slam: $CC $CFLAGS cannot compile a program:" >&2
    cat "$B/config.log" >&2
    exit 1
fi
found=$($CC --version | head -n 1)
whole="-fwhole-program -Wno-maybe-uninitialized" # of gcc
try 'int main(void) { return 0; }' $whole || whole=
cplusplus=
printf '#include <vector>\nint main() { return (int)std::vector<int>().size(); }\n' >"$B/try.cc"
if $CXX -std=c++17 $CFLAGS "$B/try.cc" -o "$B/try" >"$B/config.log" 2>&1; then cplusplus=1; else missing=", no C++ compiler"; fi

brew=/opt/homebrew # of macOS
if wanted openmp; then
    if first_of '#include <omp.h>
int main(void) { return omp_get_max_threads() < 1; }' -fopenmp \
        "-Xpreprocessor -fopenmp -I$brew/opt/libomp/include -L$brew/opt/libomp/lib -lomp"; then
        use OpenMP
    else missing="$missing, no OpenMP"; fi
fi
# Matrix products of the CPU: on x86-64 ours are as fast as OpenBLAS (test/results); elsewhere a library is used if there is one.
case ${BLAS:-$($CC -dumpmachine)} in own | x86_64*) ;; *)
    if wanted blas; then
        if first_of '#ifdef __APPLE__
#include <Accelerate/Accelerate.h>
#else
#include <cblas.h>
#endif
int main(void) { return cblas_sdot(0, 0, 1, 0, 1) != 0; }' '-framework Accelerate -DACCELERATE_NEW_LAPACK' -lopenblas \
            "-I$(echo /usr/include/*/openblas-pthread) -lopenblas" '-I/usr/include/openblas -lopenblas'; then
            flags="$flags -DSLAM_BLAS"
            use BLAS
        else missing="$missing, no BLAS"; fi
    fi ;;
esac
if wanted sndfile; then
    if first_of '#include <sndfile.h>
int main(void) { return sf_version_string()[0] == 0; }' -lsndfile "-I$brew/include -L$brew/lib -lsndfile"; then
        flags="$flags -DSLAM_SNDFILE"
        use libsndfile
    else missing="$missing, no libsndfile (only WAV)"; fi
fi
if wanted mpi; then
    for mpicc in ${MPICC:-mpicc mpicc.openmpi mpicc.mpich}; do
        use=$($mpicc -show 2>/dev/null | cut -d ' ' -f 2- | tr ' ' '\n' | grep -E '^-([ILDl]|Wl,)' | tr '\n' ' ')
        [ "$use" ] && try '#include <mpi.h>
int main(void) { int n; return MPI_Initialized(&n); }' $use || continue
        mpirun=$(echo "$mpicc" | sed 's/mpicc\([^/]*\)$/mpirun\1/')
        flags="$flags -DSLAM_MPI"
        use MPI
        break
    done
    [ "$mpirun" ] || missing="$missing, no MPI (one process)"
fi

# nvcc and, beside it, in the system's folders or in Python's packages, a library that it links.
find_library() { # find_library HEADER CALL NAME FLAGS: sets $use_flags, $use_libs
    printf '#include <%s>\nint main() { %s }\n' "$1" "$2" >"$B/try.cu"
    for folder in "$toolkit/lib64" "$toolkit/lib" '' $site; do
        use_flags=$4 use_libs=-l$3
        if [ "$folder" ]; then
            so=$(ls "$folder/lib$3.so"* 2>/dev/null | head -n 1)
            [ "$so" ] || continue
            use_flags="$4 -I${folder%/*}/include" use_libs="-Wl,-rpath,$folder $so"
        fi
        $tool $use_flags -c "$B/try.cu" -o "$B/try.o" >"$B/config.log" 2>&1 &&
            $CXX $CFLAGS "$B/try.o" -o "$B/try" $use_libs $runtime $LDFLAGS >>"$B/config.log" 2>&1 && return
    done
    return 1
}
if wanted cuda; then
    for nvcc in "$NVCC" "$(command -v nvcc)" "$CUDA_HOME/bin/nvcc" /usr/local/cuda/bin/nvcc ''; do [ -x "$nvcc" ] && break; done
    if [ "$nvcc" ] && [ "$cplusplus" ]; then
        toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
        [ "$CUDA_ARCH" ] || if nvidia-smi -L >/dev/null 2>&1; then CUDA_ARCH=native; else CUDA_ARCH=sm_80; fi
        tool="$nvcc -ccbin $CXX -std=c++17 -arch=$CUDA_ARCH -Xcompiler $(echo $CFLAGS $flags -Wall -Wextra | sed 's/,/\\,/g; s/ /,/g')"
        runtime="-L$toolkit/lib64 -L$toolkit/lib -lcudart_static -ldl -lrt -lpthread"
        site=$(python3 -c 'import site
for s in site.getsitepackages(): print(*[s + "/nvidia/" + d + "/lib" for d in ("cu13", "cublas", "nccl")])' 2>/dev/null)
        release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
        if find_library cublasLt.h 'cublasLtHandle_t h; return cublasLtCreate(&h) != 0;' cublasLt ''; then
            cuda="$tool $use_flags" libs="$libs -Wl,--as-needed $use_libs $runtime" found="$found, CUDA $release"
            if wanted nccl && find_library nccl.h 'int v; return ncclGetVersion(&v) != 0;' nccl -DSLAM_NCCL; then
                nccl=$use_flags nccl_libs=$use_libs found="$found, NCCL"
            else missing="$missing, no NCCL (one GPU)"; fi
        else missing="$missing, CUDA $release does not link cuBLASLt (see $B/config.log)"; fi
    else missing="$missing, no CUDA (nvcc not found)"; fi
fi

rm -f "$B"/try*
echo "FOUND := $found$(echo "$missing" | sed 's/^, /; /')"
echo "FLAGS := $CFLAGS $flags"
echo "LIBS := $libs $LDFLAGS -lm"
echo "WHOLE := $whole"
echo "CUDA := $cuda"
echo "NCCL := $nccl"
echo "NCCL_LIBS := $nccl_libs"
echo "MPIRUN := $mpirun"
echo "CPLUSPLUS := $cplusplus"
