# slam: `make help` says what there is to make and what to set.
#
# Objects and test programs lie in build/<compiler>[-minimal][-sanitize]-<settings>/, a folder for every combination of
# settings, compiler version, processor and libraries installed, so that nothing is mixed; the programs are linked at the top.
# What is installed is tried once for each such folder (test/detect) and kept in its config.mk.

MAKEFLAGS += --no-builtin-rules
PROGRAMS := $(basename $(wildcard train.c tokenize.c dpo.c eval.c))
all: $(PROGRAMS)

# The C++ compiler (for nvcc) is the sibling of the C compiler unless one is named: gcc-12 -> g++-12, clang -> clang++.
ifeq ($(origin CXX),default)
CXX := $(patsubst cc,c++,$(subst gcc,g++,$(subst clang,clang++,$(CC))))
endif
CLANG_FORMAT ?= $(or $(shell command -v clang-format-14),clang-format)
FUZZ_CC ?= $(or $(shell command -v clang clang-19 clang-16 clang-14 | head -n 1),clang)
GNUPLOT ?= gnuplot
RUNS ?= runs/*
quote = '$(subst ','\'',$(1))'

define HELP
Programs    make            builds train, tokenize, dpo and eval; `make train` (and so on) builds one
Checks      make test       builds and runs all tests; the last line is `N passed, N failed`
            make gpu-test   runs the CUDA kernels and training on a GPU, under compute-sanitizer as well
            make emulate    builds train-emulated and dpo-emulated, in which every CUDA kernel runs on the CPU
            make house      lists the sections of slam.h and which others each one uses
            make format-check    says what clang-format would change; `make format` changes it
            make fuzz       builds the fuzz targets of test/fuzz with clang into build/fuzz
Figures     make bench      measures training steps beside PyTorch's and keeps them in test/results
                            (BENCH="..." are its options)
            make gpu-bench  measures kernels and training steps on a GPU, beside PyTorch's
            make plot       draws the loss curves of RUNS (default: every folder in runs/) into loss.png;
                            PLOT=- draws them on the terminal
Else        make clean      removes everything that was built

Variables   MINIMAL=1       nothing but the compiler: no OpenMP, BLAS, libsndfile, MPI, CUDA
            SANITIZE=1      AddressSanitizer and UndefinedBehaviorSanitizer, without CUDA
            BLAS=openblas   CPU matrix products by own (default on x86-64), openblas or accelerate
            WITHOUT="..."   leaves some of openmp, blas, sndfile, mpi, nccl, cuda out
            CC CXX NVCC MPICC CUDA_HOME CUDA_ARCH    compilers (NVCC=/path/to/nvcc), toolkit folder, e.g. CUDA_ARCH=sm_90
            CFLAGS LDFLAGS  replace the default -O3 -march=native; are added when linking
endef
export HELP
help:
	@printf '%s\n' "$$HELP"

# ---- what is installed ----

# All that decides what test/detect will find, hashed: a change of any of it means another folder.
ifneq ($(filter-out help fuzz house plot format format-check clean,$(or $(MAKECMDGOALS),all)),)
override WITHOUT := $(sort $(WITHOUT) $(if $(MINIMAL),openmp blas sndfile mpi cuda) $(if $(SANITIZE),cuda))
SETTINGS := $(foreach v,CC CXX NVCC MPICC CUDA_HOME CUDA_ARCH BLAS CFLAGS LDFLAGS WITHOUT SANITIZE,$(v)=$(call quote,$($(v))))
B := build/$(notdir $(firstword $(CC)))$(if $(MINIMAL),-minimal)$(if $(SANITIZE),-sanitize)-$(shell \
	{ echo $(call quote,$(SETTINGS)); $(CC) --version; mpicc -show; command -v nvcc && command -v python3; ls -d /usr/local/cuda/bin/nvcc \
	/dev/nvidia0 /usr/lib*/libopenblas.so* /usr/lib*/*/libopenblas.so* /usr/include/sndfile.h \
	/opt/homebrew/include/sndfile.h /usr/local/include/sndfile.h; grep -m 1 -E '^(flags|Features)' /proc/cpuinfo; \
	} 2>/dev/null | cksum | cut -d ' ' -f 1)
include $(B)/config.mk
endif

$(B)/config.mk: test/detect
	@mkdir -p $(B)
	@B=$(B) $(SETTINGS) sh test/detect >$@.new && mv $@.new $@

# ---- programs ----

COMPILE := $(CC) -Wall -Wextra $(FLAGS)
SLAM := $(if $(CUDA),$(CUDA) $(if $(MPIRUN),$(NCCL)),$(COMPILE) -x c)
LIBS += $(if $(MPIRUN),$(NCCL_LIBS))
LINK := $(if $(CUDA),$(CXX),$(CC)) $(FLAGS)

# Names the folder that the programs at the top come from; changes, and has them linked again, when the settings do.
build/current: FORCE | $(B)/config.mk
	@mkdir -p $(B)
	@echo $(B) | cmp -s - $@ || { echo 'slam: $(FOUND)'; echo $(B) >$@; }

$(B)/slam.o: slam.cu slam.h $(B)/config.mk | build/current
	$(SLAM) -c $< -o $@
$(B)/%.o: %.c slam.h $(B)/config.mk | build/current
	$(COMPILE) -c $< -o $@
$(PROGRAMS): %: $(B)/%.o $(B)/slam.o build/current
	$(LINK) $(filter %.o,$^) -o $@ $(LIBS)

# ---- CUDA's kernels without a GPU ----

# For a debugger rather than for speed, and without CUDA: the kernels are C++ functions here. -g3: threadIdx is a macro.
EMULATE := $(CXX) -std=c++17 -Wall -Wextra $(FLAGS) -g3 -DSLAM_EMULATOR -include test/cuda_emulator.h -x c++
EMULATED := slam.h test/cuda_emulator.h test/nccl_emulator.h $(B)/config.mk
EMULATED_PROGRAMS := train-emulated dpo-emulated
emulate: $(EMULATED_PROGRAMS)
$(B)/slam-emulated.o: slam.cu $(EMULATED) | build/current
	$(EMULATE) -O0 -c $< -o $@
$(EMULATED_PROGRAMS): %-emulated: $(B)/%.o $(B)/slam-emulated.o build/current
	$(CXX) $(FLAGS) $(filter %.o,$^) -o $@ $(LIBS)
$(B)/test_cuda $(B)/test_ranks_cuda: test/check.h $(EMULATED) | build/current
	$(EMULATE) -O1 $(filter %.cu %.c,$^) -x none -o $@ $(LIBS)
$(B)/test_cuda: test/test_cuda.cu
$(B)/test_ranks_cuda: test/test_ranks.c

# ---- tests, measurements ----

# Each of these programs holds all of slam.h, so that it reaches what is static there.
TESTS := $(patsubst test/%.c,$(B)/%,$(wildcard test/test_*.c))
$(TESTS) $(B)/bench: $(B)/%: test/%.c slam.h test/check.h test/random_hubert.h $(B)/config.mk | build/current
	$(COMPILE) $< -o $@ $(LIBS)
# Without a C++ compiler the kernels' tests are left out.
CUDA_TESTS := $(if $(CPLUSPLUS),$(B)/test_cuda)
# What takes longest to compile stands first, so that no core is left with it alone.
test: $(CUDA_TESTS) $(if $(CPLUSPLUS),$(if $(MPIRUN),$(if $(SANITIZE),,$(B)/test_ranks_cuda)) $(EMULATED_PROGRAMS)) $(TESTS) $(PROGRAMS)
	@$(SETTINGS) B=$(B) MPIRUN=$(MPIRUN) FLAGS=$(call quote,$(FLAGS)) LIBS=$(call quote,$(LIBS)) sh test/run $(CUDA_TESTS) $(TESTS)
bench: $(B)/bench
	$< $(BENCH)

# The kernels' tests and the measurements as nvcc builds them for a GPU.
$(B)/gpu_test: test/test_cuda.cu
$(B)/gpu_bench: test/gpu_bench.cu
$(B)/gpu_test $(B)/gpu_bench: slam.h test/check.h test/random_hubert.h $(B)/config.mk | build/current
	@[ $(call quote,$(CUDA)) ] || { echo 'slam: $(FOUND)' >&2; exit 1; }
	$(CUDA) $(NCCL) -lineinfo -c $(filter %.cu,$^) -o $@.o
	$(LINK) $@.o -o $@ $(LIBS) $(NCCL_LIBS)
gpu-test: $(B)/gpu_test train dpo
	@MPIRUN=$(MPIRUN) sh test/test_gpu.sh $<
gpu-bench: $(B)/gpu_bench
	@sh test/gpu_bench.sh $< $(BENCH)

# -O0 builds them four times as fast
FUZZ_CFLAGS = -O1
FUZZ_TARGETS := $(patsubst test/fuzz/%.c,build/fuzz/%,$(wildcard test/fuzz/*.c))
fuzz: $(FUZZ_TARGETS)
	@echo 'fuzz: run one with e.g. build/fuzz/$(notdir $(firstword $^)) -max_total_time=600 CORPUS_FOLDER'
build/fuzz/%: test/fuzz/%.c test/fuzz/fuzz.h slam.h
	@mkdir -p $(@D)
	@command -v $(FUZZ_CC) >/dev/null || { echo 'fuzz: $(FUZZ_CC) not found: install clang' >&2; exit 1; }
	$(FUZZ_CC) -g $(FUZZ_CFLAGS) -Wall -Wextra -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $< -o $@ \
		$(if $(wildcard /usr/include/sndfile.h),-DSLAM_SNDFILE -lsndfile) -lm

# ---- what needs no build ----

house:
	@test/house
plot:
	@command -v $(GNUPLOT) >/dev/null || { echo 'plot: gnuplot not found: apt install gnuplot-nox (macOS: brew install gnuplot)' >&2; exit 1; }
	@$(GNUPLOT) -e "runs='$(patsubst %/log.jsonl,%,$(wildcard $(addsuffix /log.jsonl,$(RUNS))))'; out='$(or $(PLOT),loss.png)'" test/plot.gp

SOURCES = $(wildcard slam.h slam.cu *.c test/*.h test/*.c test/*.cu test/fuzz/*.[ch])
format:
	$(CLANG_FORMAT) -i $(SOURCES)
format-check:
	$(CLANG_FORMAT) --dry-run -Werror $(SOURCES)
clean:
	rm -rf build train tokenize dpo eval $(EMULATED_PROGRAMS)

FORCE:
.PHONY: all help test bench gpu-test gpu-bench emulate fuzz house plot format format-check clean FORCE
.DELETE_ON_ERROR:
