"""
Callbacks: checkpoints, evaluations that end the training, and your own callback that fills TensorBoard's HPARAMS tab:

    python examples/callbacks.py [timesteps] && tensorboard --logdir logs/callbacks
"""

import sys
from pathlib import Path

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import HParam

from sb3_a3c import A3C

timesteps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
folder = Path("logs/callbacks")
n_envs = 8


class Notes(BaseCallback):
    """Logs the number of episodes, and the hyper-parameters."""

    n_episodes = 0

    def _on_training_start(self) -> None:
        settings = {name: vars(self.model)[name] for name in ("learning_rate", "n_steps", "gamma", "ent_coef")}
        metrics = {"rollout/ep_rew_mean": 0.0, "eval/mean_reward": 0.0}  # names of logged values, shown as columns
        self.logger.record("hparams", HParam(settings, metrics), exclude=("stdout", "log", "json", "csv"))

    def _on_step(self) -> bool:  # called once every n_envs timesteps, with n_envs rows
        self.n_episodes += sum("episode" in info for info in self.locals["infos"])
        self.logger.record("rollout/n_episodes", self.n_episodes)
        return True  # False ends the training


env = make_vec_env("CartPole-v1", n_envs, seed=0)
eval_env = make_vec_env("CartPole-v1", n_envs=4, seed=1000)
checkpoints = CheckpointCallback(save_freq=5_000 // n_envs, save_path=str(folder / "checkpoints"), name_prefix="a3c")
evaluation = EvalCallback(
    eval_env,
    callback_on_new_best=StopTrainingOnRewardThreshold(reward_threshold=475, verbose=1),
    n_eval_episodes=10,
    eval_freq=5_000 // n_envs,
    log_path=str(folder),
    best_model_save_path=str(folder),
)
model = A3C("MlpPolicy", env, learning_rate=1e-3, seed=0, verbose=1, tensorboard_log=str(folder))
# if tqdm and rich are installed (as by stable-baselines3[extra]), progress_bar=True shows a progress bar
model.learn(timesteps, [checkpoints, evaluation, Notes()], log_interval=10)
print(f"Best evaluation: {evaluation.best_mean_reward:.1f}, after {model.num_timesteps} timesteps")

model.logger.close()
env.close()
eval_env.close()
