#!/bin/bash
# Mid-training of an 8B model with the architecture of Llama 3 on 200e9 tokens: 4 nodes of 8 GPUs,
# TP 2, PP 2, DP 8. To be started once per node; started again, it resumes.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

distributed=(
    --nproc-per-node 8 --nnodes "${SLURM_NNODES:-1}" --rdzv-backend c10d
    --rdzv-id "${SLURM_JOB_ID:-0}" --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}"
)
model=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --seq-length 8192 --max-position-embeddings 8192
    --position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --init-method-std 0.02
    --attention-dropout 0.0 --hidden-dropout 0.0
)
parallel=(
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --distributed-backend nccl --distributed-timeout-minutes 30
)
precision=(
    --bf16 --transformer-impl transformer_engine --attention-backend fused
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native
)
training=(
    --micro-batch-size 1 --global-batch-size 512 --train-iters 47684
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --lr 1e-4 --min-lr 1e-6 --lr-decay-style linear --lr-warmup-iters 500
    --seed 1234 --manual-gc --manual-gc-interval 100 --exit-duration-in-mins 230
)
data=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model /lustre/tokenizers/llama-3
    --data-path 0.5 /lustre/data/web 0.3 /lustre/data/code 0.1 /lustre/data/math
    0.1 /lustre/data/science
    --split 99,1,0 --data-cache-path /lustre/cache/mid-training --num-workers 4
    --no-create-attention-mask-in-dataloader
)
checkpoints=(
    --pretrained-checkpoint /lustre/checkpoints/llama-3-8b
    --load /lustre/checkpoints/mid-training --save /lustre/checkpoints/mid-training
    --save-interval 200 --ckpt-format torch_dist
)
logging=(
    --log-interval 10 --log-throughput --tensorboard-dir /lustre/tensorboard/mid-training
    --eval-interval 500 --eval-iters 32
)

exec torchrun "${distributed[@]}" \
    /lustre/Megatron-LM/pretrain_gpt.py \
    "${model[@]}" "${parallel[@]}" "${precision[@]}" "${training[@]}" "${data[@]}" \
    "${checkpoints[@]}" "${logging[@]}" \
    "$@"
