# A newcomer's first hour: every command but `push`, on models of the quickstart's size.
# tests/test_newcomer.py runs it in an empty folder, where only the installed wheel is.
set -euo pipefail
jaxtrain --version
jaxtrain env

# A model from nothing, and what it left behind.
jaxtrain quickstart train.steps=2 optimizer.warmup_steps=1 eval.every=2 eval.generate=2 eval.batches=1
jaxtrain status runs/quickstart
jaxtrain report runs/quickstart

# Data of one's own, on the quickstart's export.
for number in 1 2 3 4 5 6 7 8; do
  echo "{\"prompt\": \"What is $number + $number?\", \"completion\": \"#### $((number + number))\"}"
done > sums.jsonl
cat > sums.yaml <<'END'
recipe: sft
run: { dir: runs/sums }
model: { path: runs/quickstart/export, compute_dtype: float32, lora: { rank: 2 } }
data: { train: { path: sums.jsonl }, max_length: 64 }
train: { steps: 2, batch_size: 2 }
optimizer: { learning_rate: 2.0e-4 }
END
jaxtrain config optimizer
jaxtrain preview sums.yaml
jaxtrain plan sums.yaml --on cpu:1 --estimate
jaxtrain train sums.yaml
jaxtrain launch sums.yaml --backend slurm --nodes 2 --dry-run
jaxtrain export runs/sums sums
jaxtrain export runs/sums sums-adapter --adapter
grep -q "recipe: sft" sums/README.md

# The models are used.
jaxtrain convert sums sums-again
cmp sums/model.safetensors sums-again/model.safetensors
jaxtrain verify sums --tokens 16 --dtype float32
cp -r sums unknown && sed -i 's/Qwen3For/UnknownFor/; s/"qwen3"/"unknown"/' unknown/config.json
jaxtrain new-family unknown --from unknown
jaxtrain generate sums --prompts sums.jsonl --out answers.jsonl --max-tokens 4
test "$(wc -l < answers.jsonl)" = 8
cat > task.yaml <<'END'
prompts: { path: sums.jsonl }
generate: 2
max_new_tokens: 4
rewards: [{ function: exact_answer }]
END
jaxtrain eval sums --task task.yaml
printf 'What is 4 + 4?\n' | jaxtrain chat sums-adapter --max-tokens 4
jaxtrain serve runs/sums --port "$PORT" --slots 2 &
until curl -sf "http://127.0.0.1:$PORT/health"; do kill -0 $! && sleep 0.5; done
curl -sf "http://127.0.0.1:$PORT/v1/completions" -d '{"prompt": "2 + 2", "max_tokens": 2}' -H 'content-type: application/json'
kill -TERM $! && { wait $! || test $? = 143; }

# Reinforcement learning from there, repeated from its record.
cat > rl.yaml <<'END'
recipe: rl
run: { dir: runs/rl }
model: { path: sums, compute_dtype: float32 }
data: { train: { path: sums.jsonl }, max_length: 64 }
rl: { prompts: 2, generations: 2, max_completion_length: 4, rewards: [{ function: exact_answer }] }
train: { steps: 1 }
optimizer: { learning_rate: 1.0e-5 }
END
jaxtrain train rl.yaml
jaxtrain replay runs/rl runs/replayed
