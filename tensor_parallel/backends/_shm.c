/* Collectives between processes of one host through a shared mapping. Linux, C11; uses nothing of CPython, called by ctypes.
 *
 * The mapping: a header line, one control line per rank, then two buffers of `slot` bytes per rank. A collective is a series of
 * exchanges, each of one or two steps. A rank announces a step by storing its number in its own control line (release); peers
 * wait for it (acquire), so the data written before is visible on any memory model. Exchanges alternate between the two
 * buffers: to announce an exchange is also to say that the one before has been read, hence a rank may write into its buffer for
 * exchange e once every rank has announced e - 1.
 *
 * Waiting spins briefly, then sleeps on a futex: no core is burnt when there are more ranks than cores. A sleeper looks up every
 * few milliseconds for an abort, for a peer that died (its lifeline, a pipe whose only write end the peer held, hangs up) and
 * for the deadline. Every sum is formed in rank order, so that it is bitwise the same on every rank; 16-bit floats are summed
 * in single precision and rounded once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define LINE 128 /* two cache lines: adjacent-line prefetch makes a single one shared */
#define MAX_RANKS 128
#define REASON 512
#define NAP_NS 2000000L

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define VECTORISED
#endif

enum status { OK = 0, ABORTED = 1, TIMED_OUT = 2, PEER_LOST = 3, MISMATCH = 4, UNSUPPORTED = 5 };
enum dtype { U8, U16, U32, U64, F16, BF16, F32, F64 }; /* integers wrap alike whether signed or not */

struct control { /* one per rank, written by that rank only, except `sleepers` */
    _Atomic uint32_t step;
    _Atomic uint32_t sleepers;
    uint64_t signature[2]; /* of the collective announced, by buffer */
    char pad[LINE - 24];
};

struct header {
    _Atomic uint32_t failure; /* 0, or status | rank << 8, set once */
    _Atomic uint32_t reason_ready;
    char reason[REASON];
    char pad[1024 - 8 - REASON];
};

struct region {
    struct header *header;
    struct control *control;
    uint8_t *slots;
    size_t size, slot;
    int rank, ranks;
    int spins;
    int64_t timeout_ns;
    uint32_t step;     /* last step this rank announced */
    uint32_t opened;   /* step that announced the exchange before */
    uint32_t exchange; /* number of the current one */
    struct pollfd lifelines[MAX_RANKS];
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long futex(_Atomic uint32_t *word, int operation, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

static inline int reached(uint32_t step, uint32_t wanted) { return (int32_t)(step - wanted) >= 0; }

static inline uint32_t step_of(struct region *g, int rank) {
    return atomic_load_explicit(&g->control[rank].step, memory_order_acquire);
}

static inline uint8_t *buffer(struct region *g, int rank) {
    return g->slots + ((size_t)rank * 2 + (g->exchange & 1)) * g->slot;
}

/* ---- failing ------------------------------------------------------------------------------------------------------------ */

static void wake_all(struct region *g) {
    for (int r = 0; r < g->ranks; r++) futex(&g->control[r].step, FUTEX_WAKE, INT32_MAX, NULL);
}

/* The first failure of a generation is everybody's. Returns it, which may be another than the one given. */
static int fail(struct region *g, uint32_t failure, const char *reason) {
    uint32_t none = 0;
    if (atomic_compare_exchange_strong(&g->header->failure, &none, failure)) {
        if (reason) strncpy(g->header->reason, reason, REASON - 1);
        atomic_store(&g->header->reason_ready, 1);
        wake_all(g);
        return (int)failure;
    }
    return (int)none;
}

static int failure_of(struct region *g) { return (int)atomic_load_explicit(&g->header->failure, memory_order_acquire); }

/* A dead peer will never announce `step`. Its lifeline also hangs up when it closes in good order, having announced all. */
static int find_dead(struct region *g, uint32_t step, int only) {
    if (poll(g->lifelines, (nfds_t)g->ranks, 0) <= 0) return OK;
    for (int r = 0; r < g->ranks; r++) {
        if (!(g->lifelines[r].revents & (POLLHUP | POLLERR)) || (only >= 0 && r != only)) continue;
        if (!reached(step_of(g, r), step)) return PEER_LOST | r << 8;
    }
    return OK;
}

/* ---- announcing and waiting --------------------------------------------------------------------------------------------- */

static void announce(struct region *g) {
    struct control *mine = &g->control[g->rank];
    atomic_store(&mine->step, ++g->step); /* sequentially consistent with the load: a sleeper is seen, or sees the step */
    if (atomic_load(&mine->sleepers)) futex(&mine->step, FUTEX_WAKE, INT32_MAX, NULL);
}

static int sleep_until(struct region *g, int rank, uint32_t step, int only) {
    struct control *peer = &g->control[rank];
    int64_t deadline = now_ns() + g->timeout_ns;
    int status = OK;
    atomic_fetch_add(&peer->sleepers, 1);
    for (;;) {
        uint32_t seen = atomic_load(&peer->step);
        if (reached(seen, step)) break;
        if ((status = failure_of(g))) break;
        struct timespec nap = {0, NAP_NS};
        if (futex(&peer->step, FUTEX_WAIT, seen, &nap) == 0 || errno == EAGAIN) continue;
        if ((status = find_dead(g, step, only)) == OK && now_ns() > deadline) status = TIMED_OUT | rank << 8;
        if (status != OK) {
            status = fail(g, (uint32_t)status, NULL);
            break;
        }
    }
    atomic_fetch_sub(&peer->sleepers, 1);
    return status;
}

static int wait_for(struct region *g, int rank, uint32_t step, int only) {
    for (int i = 0; i < g->spins; i++) {
        if (reached(step_of(g, rank), step)) return OK;
        relax();
    }
    return reached(step_of(g, rank), step) ? OK : sleep_until(g, rank, step, only);
}

static int wait_all(struct region *g, uint32_t step) {
    for (int r = 0; r < g->ranks; r++) {
        int status = r == g->rank ? OK : wait_for(g, r, step, -1);
        if (status != OK) return status;
    }
    return OK;
}

/* Begin an exchange: when it returns OK, this rank may write into its buffer. */
static int begin(struct region *g, uint64_t signature) {
    int status = failure_of(g);
    if (status != OK) return status;
    status = wait_all(g, g->opened);
    g->exchange++;
    g->control[g->rank].signature[g->exchange & 1] = signature;
    return status;
}

static void open_step(struct region *g) {
    announce(g);
    g->opened = g->step;
}

/* Ranks that are in different collectives would exchange rubbish. Each says which it is in. */
static int agree(struct region *g, int rank) {
    uint64_t theirs = g->control[rank].signature[g->exchange & 1];
    if (theirs == g->control[g->rank].signature[g->exchange & 1]) return OK;
    return fail(g, MISMATCH | (uint32_t)rank << 8, NULL);
}

static int wait_all_agreed(struct region *g) {
    int status = wait_all(g, g->step);
    for (int r = 0; r < g->ranks && status == OK; r++) status = agree(g, r);
    return status;
}

static uint64_t signature(int operation, int detail, uint64_t bytes) {
    return (uint64_t)operation << 56 | (uint64_t)(detail & 0xff) << 48 | (bytes & 0xffffffffffffULL);
}

/* ---- sums --------------------------------------------------------------------------------------------------------------- */

#define BLOCK 2048

/* out may be one of the sources: every element is read before it is written, and no other. */
#define DEFINE_SUM(NAME, T, WIDE, LOAD, STORE)                                                                          \
    VECTORISED static void NAME(void *out_, const void *const *sources, int ranks, size_t count) {                      \
        WIDE total[BLOCK];                                                                                              \
        for (size_t at = 0; at < count; at += BLOCK) {                                                                  \
            size_t n = count - at < BLOCK ? count - at : BLOCK;                                                         \
            const T *a = (const T *)sources[0] + at, *b = (const T *)sources[1] + at;                                   \
            T *out = (T *)out_ + at;                                                                                    \
            if (ranks == 2) {                                                                                           \
                _Pragma("GCC ivdep") for (size_t i = 0; i < n; i++) out[i] = STORE((WIDE)(LOAD(a[i]) + LOAD(b[i])));    \
                continue;                                                                                               \
            }                                                                                                           \
            for (size_t i = 0; i < n; i++) total[i] = (WIDE)(LOAD(a[i]) + LOAD(b[i]));                                  \
            for (int r = 2; r < ranks; r++) {                                                                           \
                const T *c = (const T *)sources[r] + at;                                                                \
                for (size_t i = 0; i < n; i++) total[i] = (WIDE)(total[i] + LOAD(c[i]));                                \
            }                                                                                                           \
            for (size_t i = 0; i < n; i++) out[i] = STORE(total[i]);                                                    \
        }                                                                                                               \
    }

#define SAME(x) (x)

static inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float value) { /* round to nearest even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

/* Half precision by integer and float arithmetic that any compiler vectorises; exact for subnormals, infinities and NaN. */
static inline float from_f16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = (uint32_t)(x & 0x7fff) << 13;
    float value, scale = 0x1p112f;
    memcpy(&value, &magnitude, 4);
    value *= scale;
    memcpy(&magnitude, &value, 4);
    magnitude |= (x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    magnitude |= sign;
    memcpy(&value, &magnitude, 4);
    return value;
}

static inline uint16_t to_f16(float value) { /* round to nearest even */
    uint32_t bits, sign, normal, tiny;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13; /* carries into infinity by itself */
    float magnitude, shifted;
    memcpy(&magnitude, &bits, 4);
    shifted = magnitude + 0.5f; /* the float adder rounds to the subnormal grid */
    memcpy(&tiny, &shifted, 4);
    tiny -= 0x3f000000;
    uint32_t result = bits < 0x38800000 ? tiny : normal;
    result = bits >= 0x47800000 ? 0x7c00 : result;
    result = bits > 0x7f800000 ? 0x7e00 : result;
    return (uint16_t)(sign | result);
}

DEFINE_SUM(sum_u8, uint8_t, uint8_t, SAME, SAME)
DEFINE_SUM(sum_u16, uint16_t, uint16_t, SAME, SAME)
DEFINE_SUM(sum_u32, uint32_t, uint32_t, SAME, SAME)
DEFINE_SUM(sum_u64, uint64_t, uint64_t, SAME, SAME)
DEFINE_SUM(sum_f16, uint16_t, float, from_f16, to_f16)
DEFINE_SUM(sum_bf16, uint16_t, float, from_bf16, to_bf16)
DEFINE_SUM(sum_f32, float, float, SAME, SAME)
DEFINE_SUM(sum_f64, double, double, SAME, SAME)

typedef void (*sum_function)(void *, const void *const *, int, size_t);
static const sum_function SUMS[] = {sum_u8, sum_u16, sum_u32, sum_u64, sum_f16, sum_bf16, sum_f32, sum_f64};
static const size_t WIDTHS[] = {1, 2, 4, 8, 2, 2, 4, 8};

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* ---- collectives: 0, or status | rank << 8 ------------------------------------------------------------------------------ */

enum operation { BARRIER = 1, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST };

/* Every rank gives all it has and sums everything: one step, the least latency. */
static int all_reduce_once(struct region *g, uint8_t *data, size_t bytes, int dtype, uint64_t mark) {
    const void *sources[MAX_RANKS];
    int status = begin(g, mark);
    if (status != OK) return status;
    memcpy(buffer(g, g->rank), data, bytes);
    open_step(g);
    if ((status = wait_all_agreed(g)) != OK) return status;
    for (int r = 0; r < g->ranks; r++) sources[r] = r == g->rank ? data : buffer(g, r);
    SUMS[dtype](data, sources, g->ranks, bytes / WIDTHS[dtype]);
    return OK;
}

/* Every rank sums one part and hands the sum to all: two steps, the least traffic. */
static int all_reduce_parts(struct region *g, uint8_t *data, size_t bytes, int dtype, uint64_t mark) {
    const void *sources[MAX_RANKS];
    size_t part = ((bytes + (size_t)g->ranks - 1) / (size_t)g->ranks + 63) / 64 * 64;
    int status = begin(g, mark);
    if (status != OK) return status;
    size_t from = least((size_t)g->rank * part, bytes), to = least(from + part, bytes);
    uint8_t *mine = buffer(g, g->rank);
    memcpy(mine, data, from);
    memcpy(mine + to, data + to, bytes - to);
    open_step(g);
    if ((status = wait_all_agreed(g)) != OK) return status;
    for (int r = 0; r < g->ranks; r++) sources[r] = (r == g->rank ? data : buffer(g, r)) + from;
    SUMS[dtype](data + from, sources, g->ranks, (to - from) / WIDTHS[dtype]);
    memcpy(mine + from, data + from, to - from);
    announce(g);
    for (int i = 1; i < g->ranks; i++) { /* each starts with another peer */
        int r = (g->rank + i) % g->ranks;
        size_t start = least((size_t)r * part, bytes), stop = least(start + part, bytes);
        if ((status = wait_for(g, r, g->step, -1)) != OK) return status;
        memcpy(data + start, buffer(g, r) + start, stop - start);
    }
    return OK;
}

EXPORT int tp_all_reduce(struct region *g, uint8_t *data, uint64_t bytes, int dtype, uint64_t once_below) {
    uint64_t mark = signature(ALL_REDUCE, dtype, bytes);
    for (size_t at = 0; at < bytes; at += g->slot) {
        size_t n = least(bytes - at, g->slot);
        int status = n < once_below ? all_reduce_once(g, data + at, n, dtype, mark) : all_reduce_parts(g, data + at, n, dtype, mark);
        if (status != OK) return status;
    }
    return OK;
}

/* A tensor of `rows` rows, each of `width` bytes at `offset` in rows of `stride` bytes, is a stream of rows * width bytes.
 * Copy stream bytes [at, at + n) between the rows and a contiguous piece. */
static void copy_rows(uint8_t *rows, size_t stride, size_t offset, size_t width, uint8_t *piece, size_t at, size_t n, int gather) {
    if (width == stride) {
        gather ? memcpy(piece, rows + at, n) : memcpy(rows + at, piece, n);
        return;
    }
    while (n) {
        size_t column = at % width, run = least(width - column, n);
        uint8_t *place = rows + at / width * stride + offset + column;
        gather ? memcpy(piece, place, run) : memcpy(place, piece, run);
        piece += run, at += run, n -= run;
    }
}

static size_t stride_of(struct region *g, const uint64_t *widths, size_t *offsets) {
    size_t stride = 0;
    for (int r = 0; r < g->ranks; r++) {
        if (offsets) offsets[r] = stride;
        stride += widths[r];
    }
    return stride;
}

static size_t longest(struct region *g, const uint64_t *widths) {
    size_t most = 0;
    for (int r = 0; r < g->ranks; r++) most = widths[r] > most ? widths[r] : most;
    return most;
}

/* in: [rows, widths[rank]] bytes; out: [rows, sum(widths)]. */
EXPORT int tp_all_gather(struct region *g, uint8_t *in, uint8_t *out, uint64_t rows, const uint64_t *widths) {
    size_t offsets[MAX_RANKS], stride = stride_of(g, widths, offsets), total = rows * longest(g, widths);
    uint64_t mark = signature(ALL_GATHER, 0, rows * stride);
    for (size_t at = 0; at < total; at += g->slot) {
        int status = begin(g, mark);
        if (status != OK) return status;
        size_t mine = rows * widths[g->rank], n = at < mine ? least(mine - at, g->slot) : 0;
        memcpy(buffer(g, g->rank), in + (n ? at : 0), n);
        open_step(g);
        copy_rows(out, stride, offsets[g->rank], widths[g->rank], in + (n ? at : 0), at, n, 0);
        for (int i = 1; i < g->ranks; i++) {
            int r = (g->rank + i) % g->ranks;
            size_t theirs = rows * widths[r];
            n = at < theirs ? least(theirs - at, g->slot) : 0;
            if ((status = wait_for(g, r, g->step, -1)) != OK || (status = agree(g, r)) != OK) return status;
            copy_rows(out, stride, offsets[r], widths[r], buffer(g, r), at, n, 0);
        }
    }
    return OK;
}

/* in: [rows, sum(widths)] bytes; out: [rows, widths[rank]]. */
EXPORT int tp_reduce_scatter(struct region *g, uint8_t *in, uint8_t *out, uint64_t rows, const uint64_t *widths, int dtype) {
    const void *sources[MAX_RANKS];
    size_t offsets[MAX_RANKS], stride = stride_of(g, widths, offsets), total = rows * longest(g, widths);
    size_t part = g->slot / (size_t)g->ranks / 64 * 64, mine = rows * widths[g->rank];
    uint64_t mark = signature(REDUCE_SCATTER, dtype, rows * stride);
    for (size_t at = 0; at < total; at += part) {
        int status = begin(g, mark);
        if (status != OK) return status;
        for (int r = 0; r < g->ranks; r++) {
            size_t theirs = rows * widths[r], n = at < theirs ? least(theirs - at, part) : 0;
            copy_rows(in, stride, offsets[r], widths[r], buffer(g, g->rank) + (size_t)r * part, at, n, 1);
        }
        open_step(g);
        if ((status = wait_all_agreed(g)) != OK) return status;
        if (at >= mine) continue;
        for (int r = 0; r < g->ranks; r++) sources[r] = buffer(g, r) + (size_t)g->rank * part;
        SUMS[dtype](out + at, sources, g->ranks, least(mine - at, part) / WIDTHS[dtype]);
    }
    return OK;
}

EXPORT int tp_broadcast(struct region *g, uint8_t *data, uint64_t bytes, int source) {
    uint64_t mark = signature(BROADCAST, source, bytes);
    for (size_t at = 0; at < bytes; at += g->slot) {
        size_t n = least(bytes - at, g->slot);
        int status = begin(g, mark);
        if (status != OK) return status;
        if (g->rank == source) memcpy(buffer(g, source), data + at, n);
        open_step(g);
        if (g->rank == source) continue;
        if ((status = wait_for(g, source, g->step, source)) != OK || (status = agree(g, source)) != OK) return status;
        memcpy(data + at, buffer(g, source), n);
    }
    return OK;
}

EXPORT int tp_barrier(struct region *g) {
    int status = begin(g, signature(BARRIER, 0, 0));
    if (status != OK) return status;
    open_step(g);
    return wait_all_agreed(g);
}

/* ---- life of a region --------------------------------------------------------------------------------------------------- */

EXPORT uint64_t tp_region_bytes(int ranks, uint64_t slot) {
    return sizeof(struct header) + (uint64_t)ranks * sizeof(struct control) + 4096 + (uint64_t)ranks * 2 * slot;
}

/* lifelines[r]: the read end of rank r's pipe, or -1 for none. NULL and errno when it cannot be mapped. */
EXPORT struct region *tp_open(int fd, int rank, int ranks, uint64_t slot, const int *lifelines, double timeout_s, int spins) {
    if (ranks < 2 || ranks > MAX_RANKS || slot % 64) return errno = EINVAL, NULL;
    struct region *g = calloc(1, sizeof *g);
    if (!g) return NULL;
    g->size = tp_region_bytes(ranks, slot);
    uint8_t *base = mmap(NULL, g->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (base == MAP_FAILED) return free(g), NULL;
    g->header = (struct header *)base;
    g->control = (struct control *)(base + sizeof(struct header));
    size_t used = sizeof(struct header) + (size_t)ranks * sizeof(struct control);
    g->slots = base + (used + 4095) / 4096 * 4096;
    g->slot = slot, g->rank = rank, g->ranks = ranks, g->spins = spins;
    g->timeout_ns = (int64_t)(timeout_s * 1e9);
    for (int r = 0; r < ranks; r++) g->lifelines[r] = (struct pollfd){.fd = r == rank ? -1 : lifelines[r]};
    return g;
}

/* From any thread, at any time before tp_close. */
EXPORT void tp_abort(struct region *g, const char *reason) { fail(g, ABORTED | (uint32_t)g->rank << 8, reason); }

EXPORT const char *tp_reason(struct region *g) { return atomic_load(&g->header->reason_ready) ? g->header->reason : ""; }

/* No other call may be running. */
EXPORT void tp_close(struct region *g) {
    munmap(g->header, g->size);
    free(g);
}
