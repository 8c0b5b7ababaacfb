// The function that Python calls for a forward pass: all threads go through the blocks together, and share each step.
#include <algorithm>
#include <cstdlib>

#include "decoder.h"

using namespace nashswarm;

namespace {

constexpr int64_t ENOUGH = 1 << 20;   // weights times tokens that justify one more thread
constexpr int64_t TOGETHER = 64;      // rows of queries that share transposed keys

const DecoderSteps* const STEPS_BY_PATH[] = {
    &decoder_portable,
#if defined(__x86_64__)
    &decoder_avx2,
    &decoder_avx512,
    &decoder_avx512,
#elif defined(__aarch64__)
    &decoder_portable,
    &decoder_portable,
    &decoder_portable,
    &decoder_portable,
#endif
};

int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory of a pass: its size is found by a first run without memory.
struct Memory {
    char* start;
    int64_t used;
    template <class Type>
    Type* take(int64_t count) {
        auto* taken = reinterpret_cast<Type*>(start + used);
        used += rounded_up(count * sizeof(Type));
        return taken;
    }
};

// Tokens of one sequence that attend together.
struct Run {
    int64_t first, count;
};

struct Work {
    float *x, *normed, *attention, *attended, *y, *inner, *activated, *scratch;
    int8_t* activations;
    int64_t *begins, *ends;
    Run* runs;
    int64_t activation_bytes, scratch_floats;

    Work(const Decoder& model, const DecoderPass& pass, int64_t places, int count, int threads, Memory& memory) {
        const int64_t tokens = pass.count, queries = model.heads * model.head_size;
        x = memory.take<float>(tokens * model.hidden);
        normed = memory.take<float>(tokens * model.hidden);
        attention = memory.take<float>(tokens * (queries + 2 * model.key_heads * model.head_size));
        attended = memory.take<float>(tokens * queries);
        y = memory.take<float>(tokens * model.hidden);
        inner = memory.take<float>(tokens * model.inner * (model.gated ? 2 : 1));
        activated = memory.take<float>(tokens * model.inner);
        begins = memory.take<int64_t>(tokens);
        ends = memory.take<int64_t>(tokens);
        runs = memory.take<Run>(tokens);
        Trellis widest{};
        widest.columns = std::max({model.hidden, queries, model.inner});
        activation_bytes = nashswarm::activation_bytes(widest, tokens, count);
        activations = memory.take<int8_t>(3 * activation_bytes);
        scratch_floats = attention_floats(std::max(TOGETHER, model.heads / model.key_heads), places, model.head_size);
        scratch = memory.take<float>(threads * scratch_floats);
    }
};

struct Runner {
    const Decoder& model;
    const DecoderPass& pass;
    const Work& work;
    const TrellisPath& path;
    const DecoderSteps& steps;
    int count;          // digits of an activation
    int64_t runs;

    // Writes the outputs of matrices side by side: [token][output].
    void multiply(const DecoderMatrix* matrices, int64_t number, const float* x, float* y, int64_t batch) const {
        Trellis read[3];
        int64_t ends[4] = {};
        for (int64_t own = 0; own < 3; ++own) {
            const DecoderMatrix& matrix = matrices[own < number ? own : 0];
            read[own] = read_trellis(matrix.content, matrix.starts);
            ends[own + 1] = ends[own] + read[own].rows;
        }
        const auto job = [&](int64_t own) {
            const int64_t valid = own < number ? own : 0;
            int8_t* bytes = work.activations + valid * work.activation_bytes;
            return TrellisProduct{read[valid], x, matrices[valid].bias, y + ends[valid], ends[number], batch, count,
                                  place_activations(read[valid], batch, count, bytes)};
        };
        const TrellisProduct jobs[3] = {job(0), job(1), job(2)};
        path.multiply(jobs, number);
    }

    const DecoderCache& cache_of(int64_t token, int64_t number) const {
        return pass.caches[pass.sequences[token] * model.blocks + number];
    }

    void norm(const DecoderNorm& norm, const float* x, float* out) const {
        if (!norm.weight) std::copy(x, x + model.hidden, out);
        else steps.norm(x, norm, model.layer_norm, model.epsilon, model.hidden, out);
    }

    // Adds y, or its norm, to x and writes the norm of the sum.
    void add(const DecoderNorm& after, const DecoderNorm& next) const {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < pass.count; ++token) {
            float *x = work.x + token * model.hidden, *y = work.y + token * model.hidden;
            if (after.weight) norm(after, y, y);
            steps.add(x, y, model.hidden);
            norm(next, x, work.normed + token * model.hidden);
        }
    }

    // Finishes queries and keys, and writes keys and values to the cache.
    void place_heads(int64_t number) const {
        const DecoderBlock& block = model.block[number];
        const int64_t size = model.head_size, width = (model.heads + 2 * model.key_heads) * size;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < pass.count; ++token) {
            const int64_t turn = pass.positions[token] * (model.rotated / 2);
            float *head = work.attention + token * width, *keys = head + model.heads * size;
            if (model.clip != 0.0f)
                for (int64_t own = 0; own < width; ++own) head[own] = std::clamp(head[own], -model.clip, model.clip);
            if (model.joint_norms) {
                steps.norm(head, block.query, false, model.head_epsilon, model.heads * size, head);
                steps.norm(keys, block.key, false, model.head_epsilon, model.key_heads * size, keys);
            }
            const DecoderCache& cache = cache_of(token, number);
            const int64_t place = pass.places[token] - cache.shift;
            for (int64_t own = 0; own < model.heads + 2 * model.key_heads; ++own, head += size) {
                const int64_t key = own - model.heads, value = key - model.key_heads;
                const DecoderNorm& norm = key < 0 ? block.query : block.key;
                if (value < 0) {
                    if (norm.weight && !model.joint_norms) steps.norm(head, norm, false, model.head_epsilon, size, head);
                    if (model.rotated) steps.rotate(head, pass.cosines + turn, pass.sines + turn, model.rotated);
                }
                if (key < 0) continue;
                float* held = value < 0 ? cache.keys + key * cache.capacity * size : cache.values + value * cache.capacity * size;
                std::copy(head, head + size, held + place * size);
            }
        }
    }

    void attend(int64_t number, float* scratch) const {
        const DecoderBlock& block = model.block[number];
        const int64_t size = model.head_size, width = (model.heads + 2 * model.key_heads) * size;
        const int64_t group = model.heads / model.key_heads;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < pass.count; ++token) {
            const int64_t shift = cache_of(token, number).shift, place = pass.places[token];
            int64_t first = pass.firsts[token];
            if (block.window) first = std::max(first, place - block.window + 1);
            work.begins[token] = std::min(std::max(first - shift, int64_t(0)), place - shift);
            work.ends[token] = place - shift + 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < runs * model.key_heads; ++item) {
            const Run& run = work.runs[runs - 1 - item / model.key_heads];  // the longest first
            const int64_t head = item % model.key_heads;
            const DecoderCache& cache = cache_of(run.first, number);
            const int64_t slot = head * cache.capacity * size;
            steps.attend(Attention{work.attention + run.first * width + head * group * size, width, run.count, group, size,
                                   cache.keys + slot, cache.values + slot, work.begins + run.first,
                                   work.ends + run.first, block.scale, model.score_cap,
                                   work.attended + run.first * model.heads * size + head * group * size,
                                   model.heads * size},
                         scratch);
        }
    }

    // Called by all threads of a region.
    void run(float* scratch) const {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < pass.count; ++token)
            norm(model.blocks ? model.block[0].before_attention : model.norm, work.x + token * model.hidden,
                 work.normed + token * model.hidden);
        for (int64_t number = 0; number < model.blocks; ++number) {
            const DecoderBlock& block = model.block[number];
            multiply(block.attention, block.attention[1].content ? 3 : 1, work.normed, work.attention, pass.count);
            place_heads(number);
            attend(number, scratch);
            multiply(&block.output, 1, work.attended, work.y, pass.count);
            add(block.after_attention, block.before_inner);
            multiply(block.inner, block.inner[1].content ? 2 : 1, work.normed, work.inner, pass.count);
            const int64_t wide = model.inner * (model.gated ? 2 : 1);
#pragma omp for schedule(static)
            for (int64_t token = 0; token < pass.count; ++token)
                steps.activate(work.inner + token * wide, model.gated, Activation(model.activation), model.inner,
                               work.activated + token * model.inner);
            multiply(&block.down, 1, work.activated, work.y, pass.count);
            add(block.after_inner, number + 1 < model.blocks ? model.block[number + 1].before_attention : model.norm);
        }
        if (!pass.wanted) return;
#pragma omp for schedule(static)
        for (int64_t own = 0; own < pass.wanted; ++own) {
            const float* normed = work.normed + pass.wanted_tokens[own] * model.hidden;
            std::copy(normed, normed + model.hidden, work.x + own * model.hidden);
        }
        multiply(&model.head, 1, work.x, pass.logits, pass.wanted);
        if (model.logit_cap == 0.0f) return;
#pragma omp for schedule(static)
        for (int64_t own = 0; own < pass.wanted; ++own)
            steps.cap(pass.logits + own * model.vocabulary, 1.0f, model.logit_cap, model.vocabulary);
    }
};

// Writes the rows of an embedding.  Returns the place of an id that does not exist, -1 if all do, or -2 without memory.
int64_t look_up(const DecoderTable& table, const int64_t* ids, int64_t count, int64_t size, float* out, int threads, int path) {
    if (table.matrix.content)
        return look_up_rows(read_trellis(table.matrix.content, table.matrix.starts), ids, out, count, threads, path);
    for (int64_t own = 0; own < count; ++own)
        if (ids[own] < 0 || ids[own] >= table.rows) return own;
    for (int64_t own = 0; own < count; ++own)
        std::copy(table.floats + ids[own] * size, table.floats + (ids[own] + 1) * size, out + own * size);
    return -1;
}

// Splits the tokens into runs.
int64_t find_runs(const Decoder& model, const DecoderPass& pass, Run* runs) {
    const int64_t longest = std::max(TOGETHER * model.key_heads / model.heads, int64_t(1));
    int64_t number = 0;
    for (int64_t token = 0; token < pass.count; ++token) {
        const bool joins = number && pass.sequences[token] == pass.sequences[runs[number - 1].first];
        if (joins && runs[number - 1].count < longest) ++runs[number - 1].count;
        else runs[number++] = {token, 1};
    }
    return number;
}

}  // namespace

#if defined(_OPENMP)
extern "C" int omp_get_thread_num();
#else
static int omp_get_thread_num() { return 0; }
#endif

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Computes the logits of the wanted tokens, and appends the keys and values of all tokens to the cache.  Returns 1 if there
// is no memory, 2 for a token and 3 for a position that the model does not have, else 0.
EXPORTED int nashswarm_decoder_pass(const Decoder* model, const DecoderPass* pass, int count, int threads, int path) {
    int64_t places = 0;
    for (int64_t token = 0; token < pass->count; ++token) places = std::max(places, pass->places[token] + 1);
    const int64_t enough = pass->count * model->hidden * model->hidden * 4 * std::max(model->blocks, int64_t(1)) / ENOUGH;
    const int woken = int(std::clamp(enough, int64_t(1), int64_t(threads)));
    Memory memory{nullptr, 0};
    Work(*model, *pass, places, count, woken, memory);
    memory = {static_cast<char*>(std::aligned_alloc(64, memory.used)), 0};
    if (!memory.start) return 1;
    const Work work(*model, *pass, places, count, woken, memory);
    const Runner runner{*model, *pass, work, *trellis_paths[path], *STEPS_BY_PATH[path], count,
                        find_runs(*model, *pass, work.runs)};
    const auto failure = [](int64_t place, int missing) { return place == -1 ? 0 : place == -2 ? 1 : missing; };
    int failed = failure(look_up(model->tokens, pass->ids, pass->count, model->hidden, work.x, woken, path), 2);
    for (int64_t own = 0; model->embedding_scale != 1.0f && own < pass->count * model->hidden; ++own)
        work.x[own] *= model->embedding_scale;
    if (!failed && model->places.rows) {
        failed = failure(look_up(model->places, pass->positions, pass->count, model->hidden, work.y, woken, path), 3);
        runner.steps.add(work.x, work.y, pass->count * model->hidden);
    }
    if (!failed) {
#pragma omp parallel num_threads(woken) if (woken > 1)
        runner.run(work.scratch + omp_get_thread_num() * work.scratch_floats);
    }
    std::free(memory.start);
    return failed;
}

}  // extern "C"
