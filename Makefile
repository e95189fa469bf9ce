# slam: `make help` lists targets and variables.
#
# Objects and test programs are in build/NAME, the programs at the top. test/config.sh detects what is installed, once for each
# NAME, and its result is kept in build/NAME/config.mk.

MAKEFLAGS += --no-builtin-rules
PROGRAMS := train tokenize dpo eval
all: $(PROGRAMS)

define HELP
make [train tokenize dpo eval]   builds the programs
make test          builds and runs all tests; the last line is `N passed, N failed`
make emulate       builds train-emulated and dpo-emulated, which run the CUDA kernels on the CPU
make gpu-test      tests the kernels and training on a GPU, under compute-sanitizer too
make bench         measures training steps next to PyTorch's, into test/results (options: BENCH="...")
make gpu-bench     measures kernels and training steps on a GPU, next to PyTorch's
make gpu-first     the most important of both within nine minutes, into RESULTS=FOLDER (DRY=1: tiny, under the emulator)
make plot          draws loss.png from the logs of RUNS (default: all in runs/); PLOT=FILE.png draws another file, PLOT=- on the
                   terminal; NGRAMS=FILE adds the n-gram losses in a file of `./eval RUN ppl --json FILE`.
                   WAV=FOLDERS draws spectrograms of their .wav files instead, one above the other, into spectrograms.png
make fuzz          builds the fuzz targets of test/fuzz with clang into build/fuzz
make house         checks the structure of slam.h
make format-check  lists what clang-format would change; `make format` changes it
make clean         removes everything that was built

MINIMAL=1          uses only the compiler: no OpenMP, BLAS, libsndfile, MPI, CUDA
SANITIZE=1         AddressSanitizer and UndefinedBehaviorSanitizer, no CUDA
WITHOUT="..."      disables some of openmp blas sndfile mpi nccl cuda
BLAS=openblas      CPU matrix products by a BLAS library (default on x86-64: own)
CC CXX NVCC MPICC CUDA_HOME CUDA_ARCH   compilers, toolkit folder, e.g. CUDA_ARCH=sm_90
CFLAGS             replaces -O3 -march=native
LDFLAGS            is added when linking
endef
export HELP
help:
	@printf '%s\n' "$$HELP"

# ---- configuration ----

# The C++ compiler (for nvcc) belongs to the C compiler: gcc-12 -> g++-12, clang -> clang++.
ifeq ($(origin CXX),default)
CXX := $(patsubst cc,c++,$(subst gcc,g++,$(subst clang,clang++,$(CC))))
endif
CLANG_FORMAT ?= $(or $(shell command -v clang-format-14),clang-format)
FUZZ_CC ?= $(or $(shell command -v clang clang-19 clang-16 clang-14 | head -n 1),clang)
override WITHOUT := $(sort $(WITHOUT) $(if $(MINIMAL),openmp blas sndfile mpi cuda) $(if $(SANITIZE),cuda))
empty :=
B := build/$(subst $(empty) ,-,$(strip $(notdir $(CC)) $(if $(SANITIZE),sanitize) $(addprefix no-,$(WITHOUT)) $(BLAS) $(CUDA_ARCH)))
VARIABLES := $(foreach v,B CC CXX NVCC MPICC CUDA_HOME CUDA_ARCH BLAS CFLAGS LDFLAGS WITHOUT SANITIZE,$(v)='$($(v))')

ifneq ($(filter-out help fuzz house plot format format-check clean,$(or $(MAKECMDGOALS),all)),)
include $(B)/config.mk
endif
$(B)/config.mk: test/config.sh
	@mkdir -p $(B)
	@$(VARIABLES) sh test/config.sh >$@.new && mv $@.new $@

# ---- programs ----

COMPILE := $(CC) -Wall -Wextra $(FLAGS)
SLAM := $(if $(CUDA),$(CUDA) $(if $(MPIRUN),$(NCCL)),$(COMPILE) -x c)
LIBS += $(if $(MPIRUN),$(NCCL_LIBS))
LINK := $(if $(CUDA),$(CXX),$(CC)) $(FLAGS)

# Names the build folder of the programs at the top, which are linked again when it changes.
build/current: FORCE | $(B)/config.mk
	@echo $(B) | cmp -s - $@ || { echo 'slam: $(FOUND)'; echo $(B) >$@; }
$(B)/slam.o: slam.cu slam.h $(B)/config.mk | build/current
	$(SLAM) -c $< -o $@
$(B)/%.o: %.c slam.h $(B)/config.mk | build/current
	$(COMPILE) -c $< -o $@
$(PROGRAMS): %: $(B)/%.o $(B)/slam.o build/current
	$(LINK) $(filter %.o,$^) -o $@ $(LIBS)

# The CUDA kernels on the CPU, as C++ functions. -Og -g3 for a debugger (threadIdx is a macro).
EMULATE := $(CXX) -std=c++17 -Wall -Wextra $(FLAGS) -g3 -DSLAM_EMULATOR -include test/cuda_emulator.h -x c++
EMULATED := slam.h test/cuda_emulator.h test/nccl_emulator.h $(B)/config.mk
EMULATED_PROGRAMS := train-emulated dpo-emulated
emulate: $(EMULATED_PROGRAMS)
$(B)/slam-emulated.o: slam.cu $(EMULATED) | build/current
	$(EMULATE) -Og -c $< -o $@
$(EMULATED_PROGRAMS): %-emulated: $(B)/%.o $(B)/slam-emulated.o build/current
	$(CXX) $(FLAGS) $(filter %.o,$^) -o $@ $(LIBS)

# ---- tests and measurements ----

# A test program includes slam.h with its implementation, so that it reaches static functions. The compiler drops what it does not
# reach (WHOLE; across so many functions it warns of variables that are set). -O3 takes twice as long to compile: only tests of loops
# over numbers need it. TEST_SKIP: names of tests to skip.
SKIP := $(addprefix $(B)/,$(TEST_SKIP))
TESTS := $(filter-out $(SKIP),$(patsubst test/%.c,$(B)/%,$(wildcard test/test_*.c)))
UNOPTIMISED := $(patsubst %,$(B)/test_%,data formats objectives ranks scoring speech tokenize)
$(TESTS) $(B)/bench: $(B)/%: test/%.c slam.h test/check.h test/random_hubert.h $(B)/config.mk | build/current
	$(CC) $(WHOLE) -Wall -Wextra $(FLAGS) $(if $(filter $(UNOPTIMISED),$@),-O1) $< -o $@ $(LIBS)
$(B)/test_cuda: test/test_cuda.cu
$(B)/test_ranks_cuda: test/test_ranks.c
$(B)/test_cuda $(B)/test_ranks_cuda: test/check.h $(EMULATED) | build/current
	$(EMULATE) $(WHOLE) -O1 $(filter %.cu %.c,$^) -x none -o $@ $(LIBS)
CUDA_TESTS := $(if $(CPLUSPLUS),$(filter-out $(SKIP),$(B)/test_cuda))
# what takes longest first
test: $(PROGRAMS) $(CUDA_TESTS) $(if $(CPLUSPLUS),$(EMULATED_PROGRAMS) $(if $(MPIRUN),$(if $(SANITIZE),,$(B)/test_ranks_cuda))) $(TESTS)
	@$(VARIABLES) MPIRUN=$(MPIRUN) FLAGS='$(FLAGS)' LIBS='$(LIBS)' sh test/run $(CUDA_TESTS) $(TESTS)
bench: $(B)/bench
	$< $(BENCH)

$(B)/gpu_test: test/test_cuda.cu
$(B)/gpu_bench: test/gpu_bench.cu
$(B)/gpu_test $(B)/gpu_bench: slam.h test/check.h test/random_hubert.h $(B)/config.mk | build/current
	@[ '$(CUDA)' ] || { echo 'slam: $(FOUND)' >&2; exit 1; }
	$(CUDA) $(NCCL) -lineinfo -c $(filter %.cu,$^) -o $@.o
	$(LINK) $@.o -o $@ $(LIBS) $(NCCL_LIBS)
gpu-programs: $(B)/gpu_test $(B)/gpu_bench
$(B)/gpu_bench-emulated: test/gpu_bench.cu test/random_hubert.h $(EMULATED) | build/current
	$(EMULATE) -O1 $< -x none -o $@ $(LIBS)
gpu-first:
	@MAKE='$(MAKE)' BUILD='$(B)' MPIRUN='$(MPIRUN)' DRY='$(DRY)' sh test/gpu_first.sh
gpu-test: $(B)/gpu_test train dpo
	@MPIRUN=$(MPIRUN) sh test/test_gpu.sh $<
gpu-bench: $(B)/gpu_bench
	@sh test/gpu_bench.sh $< $(BENCH)

FUZZ_CFLAGS = -O1
FUZZ_TARGETS := $(patsubst test/fuzz/%.c,build/fuzz/%,$(wildcard test/fuzz/fuzz_*.c))
fuzz: $(FUZZ_TARGETS)
	@echo 'fuzz: run one with e.g. build/fuzz/$(notdir $(firstword $^)) -max_total_time=600 CORPUS_FOLDER'
$(FUZZ_TARGETS): build/fuzz/fuzz
	@ln -f $< $@
build/fuzz/fuzz: $(wildcard test/fuzz/*.[ch]) slam.h
	@mkdir -p $(@D)
	@command -v $(FUZZ_CC) >/dev/null || { echo 'fuzz: $(FUZZ_CC) not found: install clang' >&2; exit 1; }
	$(FUZZ_CC) -g $(FUZZ_CFLAGS) -Wall -Wextra -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all test/fuzz/fuzz.c -o $@ \
		$(if $(wildcard /usr/include/sndfile.h),-DSLAM_SNDFILE -lsndfile) -lm

# ---- without a build ----

house:
	@sh test/house.sh
RUNS ?= runs/*
ifdef WAV
plot: # the files become the channels of one, each of which gets a panel
	@command -v sox >/dev/null || { echo 'plot: sox not found: apt install sox (macOS: brew install sox)' >&2; exit 1; }
	@for file in $(WAV:=/*.wav); do [ -f "$$file" ] || { echo "plot: $$file: no such file" >&2; exit 1; }; \
	set -- "$$@" "|sox '$$file' -r 16k -c 1 -p"; names="$$names $$(basename "$$file")"; done; \
	sox $$([ $$# = 1 ] || echo -M) "$$@" -n spectrogram -y 257 -t "$$names" -o '$(or $(PLOT),spectrograms.png)' && \
		echo 'plot: $(or $(PLOT),spectrograms.png)'
else
plot:
	@command -v gnuplot >/dev/null || { echo 'plot: gnuplot not found: apt install gnuplot-nox (macOS: brew install gnuplot)' >&2; exit 1; }
	@gnuplot -e "runs='$(patsubst %/log.jsonl,%,$(wildcard $(addsuffix /log.jsonl,$(RUNS))))'; out='$(or $(PLOT),loss.png)'; ngrams='$(NGRAMS)'" test/plot.gp
endif
SOURCES = $(wildcard slam.h slam.cu *.c test/*.h test/*.c test/*.cu test/fuzz/*.[ch])
format:
	$(CLANG_FORMAT) -i $(SOURCES)
format-check:
	$(CLANG_FORMAT) --dry-run -Werror $(SOURCES)
clean:
	rm -rf build $(PROGRAMS) $(EMULATED_PROGRAMS)

FORCE:
.PHONY: all help test bench gpu-programs gpu-first gpu-test gpu-bench emulate fuzz house plot format format-check clean FORCE
.DELETE_ON_ERROR:
