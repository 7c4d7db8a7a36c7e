"""The ``mix.yaml`` that ``mergemix init`` writes."""

TEMPLATE = """\
# One experiment: which mixture of these domains should a model be trained on?
# `mergemix plan mix.yaml` checks this file and says what everything will cost.
# A setting that is commented out (#key: value) shows its default; docs/settings.md has all of them.

run_dir: runs/mix                  # everything the experiment writes goes here

tokenizer:
  kind: byte                       # byte, or huggingface with path: FOLDER

model:                             # the architecture; must be that of the base checkpoint
  num_layers: 12
  hidden_size: 768
  num_attention_heads: 12
  #num_query_groups: 12            # key-value heads; default: as many as attention heads
  #ffn_hidden_size: 2048           # default: 8/3 x hidden_size with swiglu, else 4 x
  seq_length: 1024
  #vocab_size: 257                 # default: the tokenizer's
  #make_vocab_size_divisible_by: 128
  #activation: swiglu              # or gelu
  #normalization: RMSNorm          # or LayerNorm
  #norm_epsilon: 1.0e-5
  #position_embedding: rope        # or learned_absolute
  #rotary_base: 10000
  #tie_embeddings: true
  #precision: fp32                 # or bf16
  # For a mixture of (MoE) experts: num_moe_experts, moe_top_k, moe_ffn_hidden_size.

parallel:
  processes: 1                     # ranks; what tensor x pipeline leaves over is data parallel
  #tensor: 1
  #pipeline: 1
  #expert: 1
  #distributed_optimizer: false

training:
  global_batch_size: 64            # sequences per step
  micro_batch_size: 8
  #adam_beta1: 0.9
  #adam_beta2: 0.95
  #weight_decay: 0.1
  #clip_grad: 1.0
  #save_interval: 500
  #log_interval: 10

base:                              # every expert starts from it; exactly one of the two
  checkpoint: /checkpoints/base    # torch_dist: a root with a tracker file, or one iter_ folder
  # train: {tokens: 1e9, lr: 1e-3} # or a small one from scratch, to try the method out

domains:                           # named sources: Megatron datasets without .bin/.idx
  math:
    prefixes: [/data/math_web, /data/math_qa]  # a list is weighted by tokens
  code:
    prefixes: {/data/code: 0.8, /data/notebooks: 0.2}  # a mapping gives the weights
  web:
    prefixes: [/data/web]
    #bounds: [0.0, 1.0]            # least and largest share the search may recommend
    #max_epochs: 4                 # never repeated more often than that in blend.train_tokens
  # A group of domains, each with its own expert, for search.hierarchy; bounds are of its total:
  # science: {children: {papers: {prefixes: [/data/papers]}, books: {prefixes: [/data/books]}}}

experts:                           # short runs, one per domain; these are merged
  tokens: 5e9                      # each
  lr: 3.7e-4                       # constant
  #warmup_steps: 0
  #general_share: 0.25             # general data in every expert; 0 is the MergeMix paper
  #general_mixture: uniform        # or proportional, or {math: 0.2, code: 0.3, web: 0.5}
  # components: {stem: {math: 0.6, code: 0.4}, ...}  # other experts than one per domain, in place
  # of general_share and general_mixture: name -> what it is trained on
  #average_last: null              # the mean of its last n saves; null: of the last third's
  #seed: 1
  # checkpoints: {math: FOLDER, code: FOLDER, web: FOLDER}  # when they are trained already;
  # general_share or components then say on what, which nobody can see: 0 for one domain each

evaluate:
  capabilities:                    # what is measured on every merged model
    math: {loss: {prefixes: [/data/heldout/math]}}
    code: {loss: {prefixes: [/data/heldout/code]}}
    web: {loss: {prefixes: [/data/heldout/web], sequences: 128, metric: loss}}
    # knowledge: {lm_eval: {tasks: [mmlu, tasks/own.yaml], num_fewshot: 5, limit: 500}}
    # tests: {command: {run: "python tests.py {checkpoint} --out {output}", metrics: [pass.rate]}}
  utility:                         # the number that is maximised
    kind: mean                     # over the capabilities; or worst
    #normalize: vertices           # or zscore, none
    #weights: {math: 1, code: 1, web: 1}
  #held_out: 0.2                   # items that only the final comparison sees
  #micro_batch_size: 8
  # With commands: commands_at_once: 1, scratch: FOLDER (for candidates too large for /dev/shm)

search:
  trials: 40                       # merged models that are scored
  #strategy: mergemix              # or iterative, bayesian, gradient, grid, fixed, optuna
  #surrogate: auto                 # or gp, gp_root, quadratic, loglinear, lightgbm
  #top_k: 512
  #first_share: 1.0                # below 1: this share of the items first, the rest for a third
  #ensemble: false                 # the experts' averaged probabilities as a second proxy
  #min_share: 0.0                  # no share between 0 and this
  #kl: 0.0                         # what leaving a prior costs, in units of the utility
  #replicas: auto                  # what data-parallel replicas divide: candidates or requests
  #resident: auto                  # where base and experts lie: device, host or file
  #seed: 0
  # With domains that have children:
  # hierarchy: top_down            # or bottom_up; group by group instead of all domains at once
  # group_trials: 24               # inside each group; or {science: 16}

blend:
  train_tokens: 2e11               # the big run; for epochs per domain and max_epochs
  #split: "99,1,0"

# What `mergemix submit` asks a SLURM cluster for; nodes x gpus_per_node is parallel.processes.
# slurm: {nodes: 1, gpus_per_node: 8, partition: NAME, account: NAME, time: {expert: 8:00:00}}

# With your own launch of Megatron-LM's pretrain_gpt.py instead of the built-in trainer, which then
# brings model, parallel and training along: leave those three sections away, but for
# training.save_interval, which a launch without --save-interval goes by.
# launch: {kind: command}

# Mixtures that `mergemix validate` really trains, to check what the search says.
#references: {learned: learned, uniform: uniform, proportional: proportional}
#validation: {space_filling: 0}    # so many more, spread over all mixtures; 24 tell ranks
"""
