/* nccl_emulator.h - the calls of NCCL that slam.h makes, by MPI, on the emulator's memory

   What is asked of a stream other than the first one waits there until somebody waits for that stream: numbers that are read before
   they were waited for are the old ones. Sums are added in the order of ranks. */
#ifndef NCCL_EMULATOR_H
#define NCCL_EMULATOR_H
#define OMPI_SKIP_MPICXX
#define MPICH_SKIP_MPICXX
#include <mpi.h>
#define SLAM_NCCL

typedef int ncclResult_t;
typedef struct emulator_nccl {
    int rank, n;
} * ncclComm_t;
typedef struct ncclUniqueId {
    char mark[128];
} ncclUniqueId;
typedef enum { ncclChar, ncclFloat, ncclDouble } ncclDataType_t;
enum { ncclSuccess, ncclInvalidUsage, ncclRemoteError };
enum { ncclSum };

static inline const char *ncclGetErrorString(ncclResult_t r) { return r == ncclRemoteError ? "remote error" : "invalid usage"; }
static inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { return strcpy(id->mark, "emulated"), ncclSuccess; }
static inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int n, ncclUniqueId id, int rank) {
    *comm = new emulator_nccl();
    (*comm)->rank = rank;
    (*comm)->n = n;
    const char *fails = getenv("EMULATOR_NCCL_FAILS"); // a rank that does not get this far, for which the others wait
    if (fails && atoi(fails) == rank) return ncclInvalidUsage;
    if (fails) MPI_Barrier(MPI_COMM_WORLD);
    return strcmp(id.mark, "emulated") ? ncclInvalidUsage : ncclSuccess; // every rank has rank 0's
}
static inline ncclResult_t ncclCommDestroy(ncclComm_t comm) { return delete comm, ncclSuccess; }

/* A rank whose network is gone before its first reduction: from then on nothing that goes to the stream is ever done. */
static inline void emulator_break(ncclComm_t comm) {
    const char *breaks = getenv("EMULATOR_NCCL_BREAKS");
    if (breaks && atoi(breaks) == comm->rank) emulator_device.stuck = 1;
}
static inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *state) {
    return *state = emulator_device.stuck ? ncclRemoteError : ncclSuccess, ncclSuccess;
}
static inline ncclResult_t ncclCommAbort(ncclComm_t comm) {
    emulator_device.stuck = 0;
    return ncclCommDestroy(comm);
}

/* Room for all ranks' numbers, where they are added. */
template <typename T> static void emulator_add(ncclComm_t comm, const void *in, void *out, size_t n, size_t first, size_t count) {
    std::vector<T> all((size_t)comm->n * n);
    MPI_Allgather(in, (int)(n * sizeof(T)), MPI_BYTE, all.data(), (int)(n * sizeof(T)), MPI_BYTE, MPI_COMM_WORLD);
    for (size_t i = 0; i < count; i++) {
        T sum = all[first + i];
        for (int k = 1; k < comm->n; k++) sum += all[(size_t)k * n + first + i];
        ((T *)out)[i] = sum;
    }
}

static inline ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t type, int, ncclComm_t comm,
                                             cudaStream_t stream) {
    if (type != ncclFloat) return ncclInvalidUsage;
    emulator_break(comm);
    emulator_ask_later(stream, [=] { emulator_add<float>(comm, in, out, n * (size_t)comm->n, n * (size_t)comm->rank, n); });
    return ncclSuccess;
}
static inline ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t type, int, int root, ncclComm_t comm,
                                      cudaStream_t stream) {
    if (type != ncclFloat) return ncclInvalidUsage;
    emulator_ask_later(stream, [=] { emulator_add<float>(comm, in, out, n, 0, comm->rank == root ? n : 0); });
    return ncclSuccess;
}
static inline ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t type, int, ncclComm_t comm,
                                         cudaStream_t stream) {
    if (type != ncclDouble) return ncclInvalidUsage;
    emulator_ask_later(stream, [=] { emulator_add<double>(comm, in, out, n, 0, n); });
    return ncclSuccess;
}
static inline ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t type, ncclComm_t comm,
                                         cudaStream_t stream) {
    if (type != ncclChar) return ncclInvalidUsage;
    emulator_ask_later(stream, [=] {
        std::vector<char> own((const char *)in, (const char *)in + n); // it may lie in `out`
        MPI_Allgather(own.data(), (int)n, MPI_BYTE, out, (int)n, MPI_BYTE, MPI_COMM_WORLD);
    });
    (void)comm;
    return ncclSuccess;
}
static inline ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t type, int root, ncclComm_t comm,
                                         cudaStream_t stream) {
    if (type != ncclChar) return ncclInvalidUsage;
    emulator_ask_later(stream, [=] {
        if (comm->rank == root && in != out) memmove(out, in, n);
        MPI_Bcast(out, (int)n, MPI_BYTE, root, MPI_COMM_WORLD);
    });
    return ncclSuccess;
}
#endif
