"""
LSTM policies for A3C, and the aliases of SB3's feed-forward policies.

A rollout of ``n_steps`` steps in ``n_envs`` environments is a time-major batch, flattened to (n_steps * n_envs, …);
``episode_starts``, (n_steps, n_envs), gives both numbers. Acting is a rollout of one step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_a3c.policies.activation_cache.cache import ActivationCache, ChunkCache, new_activation_cache
from sb3_a3c.policies.impossible import impossible
from sb3_a3c.policies.overrides import is_overridden
from sb3_a3c.policies.sampling import sample_actions, to_env_actions, unvalidated_if_traced
from sb3_a3c.policies.torch_layers import BabyCNN, EmbeddingExtractor, LstmState, add_to_forget_gates, run_lstm
from sb3_a3c.policies.value_normalizer import ValueNormalizer

MlpPolicy = ActorCriticPolicy
CnnPolicy = ActorCriticCnnPolicy
MultiInputPolicy = MultiInputActorCriticPolicy


class LstmActorCriticPolicy(ActorCriticPolicy):
    """
    Actor and critic over one LSTM. The gradients of *both* heads flow through it (in sb3-contrib's shared LSTM the
    critic's does not). Alias: ``MlpLstmPolicy``.

    Parameters that are not listed are those of SB3's ``ActorCriticPolicy``, in its order; the features extractor is always
    shared. Shapes of the methods' parameters: ``obs`` (n_envs, …), ``state`` before the step, each part
    (n_lstm_layers, n_envs, lstm_hidden_size), and ``episode_starts`` (n_envs,), bool; where True the state is zeroed first.

    :param net_arch: layers between the LSTM and the heads. None: one of 64 units for actor and critic each; in
        ``CnnLstmPolicy`` none, the heads are linear
    :param lstm_hidden_size: number of hidden units of each LSTM layer. None: 64; in ``CnnLstmPolicy`` 256
    :param n_lstm_layers: number of LSTM layers
    :param shared_lstm: True, the default unless ``enable_critic_lstm`` is given: one LSTM for actor and critic
    :param enable_critic_lstm: False without ``shared_lstm=True``: the critic has no memory, but a linear layer of
        ``lstm_hidden_size`` units in the place of the LSTM, as in sb3-contrib
    :param lstm_kwargs: further arguments for ``th.nn.LSTM`` (``dropout``, ``bias``)
    :param forget_gate_bias: is added to the initial biases of the forget gates. With 0, an untrained LSTM forgets about half
        of its cell state at each step, with 1 a quarter, with 2 an eighth. Jozefowicz et al. 2015 ("An empirical exploration
        of recurrent network architectures") recommend 1
    :param channels_last: keep convolution weights in ``th.channels_last``, which CPUs compute up to twice as fast
    :param normalize_values: let the value head learn normalized values, so that large rewards do no harm, see
        :class:`~sb3_a3c.policies.value_normalizer.ValueNormalizer`. None: True, but for ``CnnLstmPolicy``
    :raises ValueError: if ``lstm_kwargs`` asks for a bidirectional, batch-first or projected LSTM, or other arguments for
        an LSTM or a features extractor of the critic's own; or if an LSTM without biases is to have ``forget_gate_bias``
    """

    #: The features extractor of this class unless another one is given.
    default_features_extractor_class: type[BaseFeaturesExtractor] = EmbeddingExtractor
    # The arguments of these names unless they are given. In CartPole with hidden velocities, at a learning rate of 1e-3, a
    # larger LSTM collapses to one action, without layers behind it policies learn later, and without an embedding before it
    # good policies are lost again. (With layer normalization behind it too, policies are lost in CartPole and Acrobot.)
    default_net_arch: tuple[int, ...] = (64,)
    default_lstm_hidden_size = 64
    default_normalize_values = True
    #: Adam's ``eps`` with normalized values, with which losses do not grow with rewards. With a smaller one, gradients
    #: of noise only (Acrobot before its first success) move parameters as far as others do, until all actions are the same.
    default_adam_eps: float | None = 1e-3

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        *args: Any,
        lstm_hidden_size: int | None = None,
        n_lstm_layers: int = 1,
        shared_lstm: bool | None = None,
        enable_critic_lstm: bool | None = None,
        lstm_kwargs: dict[str, Any] | None = None,
        forget_gate_bias: float = 0.0,
        channels_last: bool = True,
        normalize_values: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.channels_last = channels_last
        self.normalize_values = self.default_normalize_values if normalize_values is None else normalize_values
        self.lstm_hidden_size = self.default_lstm_hidden_size if lstm_hidden_size is None else lstm_hidden_size
        self.n_lstm_layers = n_lstm_layers
        self.shared_lstm, self.enable_critic_lstm = shared_lstm, enable_critic_lstm
        self.lstm_kwargs = lstm_kwargs or {}
        self.forget_gate_bias = forget_gate_bias
        own = dict(
            shared_lstm=shared_lstm,
            enable_critic_lstm=enable_critic_lstm,
            lstm_kwargs=lstm_kwargs,
            forget_gate_bias=forget_gate_bias,
        )
        if errors := impossible({**kwargs, **own}):
            raise ValueError(" ".join(errors))
        kwargs.setdefault("features_extractor_class", self.default_features_extractor_class)
        uses_adam = kwargs.get("optimizer_class", th.optim.Adam) is th.optim.Adam
        if uses_adam and self.normalize_values and self.default_adam_eps is not None:
            kwargs["optimizer_kwargs"] = {"eps": self.default_adam_eps, **(kwargs.get("optimizer_kwargs") or {})}
        net_arch = list(self.default_net_arch) if net_arch is None else net_arch
        super().__init__(observation_space, action_space, lr_schedule, net_arch, *args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lstm_hidden_size=self.lstm_hidden_size,
            n_lstm_layers=self.n_lstm_layers,
            shared_lstm=self.shared_lstm,
            enable_critic_lstm=self.enable_critic_lstm,
            lstm_kwargs=self.lstm_kwargs,
            forget_gate_bias=self.forget_gate_bias,
            channels_last=self.channels_last,
            normalize_values=self.normalize_values,
        )
        return data

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """As SB3's, which tells its own extractors that images are normalized already, but not others."""
        is_ours = issubclass(self.features_extractor_class, BabyCNN | EmbeddingExtractor)
        if not self.normalize_images and is_ours:
            self.features_extractor_kwargs = {**self.features_extractor_kwargs, "normalized_image": True}
        return super().make_features_extractor()

    def _build_mlp_extractor(self) -> None:
        # SB3 calls this after building the features extractor, before the heads and the optimizer
        self.lstm = nn.LSTM(int(self.features_dim), self.lstm_hidden_size, self.n_lstm_layers, **self.lstm_kwargs)
        add_to_forget_gates(self.lstm, self.forget_gate_bias)
        #: in the place of the LSTM, for a critic without memory
        self.critic: nn.Linear | None = None
        if self.enable_critic_lstm is not None and not self.shared_lstm:
            self.critic = nn.Linear(int(self.features_dim), self.lstm_hidden_size)
        self.mlp_extractor = MlpExtractor(
            self.lstm_hidden_size, net_arch=self.net_arch, activation_fn=self.activation_fn, device=self.device
        )
        self.value_normalizer = ValueNormalizer() if self.normalize_values else None

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        extractor = self.features_extractor
        if self.ortho_init and isinstance(extractor, BabyCNN) and extractor.is_original():
            extractor.center_filters()
        if self.channels_last:
            for weight in self.features_extractor.parameters():
                if weight.dim() == 4:  # only now: ortho_init needs contiguous weights
                    weight.data = weight.data.clone(memory_format=th.channels_last)

    def initial_state(self, n_envs: int) -> LstmState:
        """Zeros, as at the start of an episode."""
        shape = (self.n_lstm_layers, n_envs, self.lstm_hidden_size)
        return tuple(th.zeros(shape, dtype=self._dtype, device=self.device) for _ in range(2))

    @property
    def _dtype(self) -> th.dtype:
        return next(self.lstm.parameters()).dtype

    def extract_features(self, obs: PyTorchObs, features_extractor: Callable[[Any], th.Tensor] | None = None) -> th.Tensor:
        """As SB3's, but in the precision of the parameters; SB3 always converts to float32."""
        preprocessed = preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)
        if isinstance(preprocessed, dict):
            preprocessed = {key: value.to(self._dtype) for key, value in preprocessed.items()}
        else:
            preprocessed = preprocessed.to(self._dtype)
        features: th.Tensor = (features_extractor or self.features_extractor)(preprocessed)
        return features

    def new_activation_cache(self, n_steps: int, chunks: Sequence[slice]) -> ActivationCache | None:
        """
        A cache that saves :meth:`evaluate_actions` the forward pass; None if this policy can't use one.

        :param n_steps: number of steps of a rollout
        :param chunks: environments that are evaluated together; the chunks cover all environments in order
        """
        if is_overridden(self, LstmActorCriticPolicy, "extract_features", "forward", "act", "evaluate_actions"):
            return None
        return new_activation_cache(self.features_extractor, self.lstm, n_steps, chunks)

    def forward(  # type: ignore[override]
        self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor, deterministic: bool = False
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, LstmState]:
        """
        One step of ``n_envs`` environments.

        :param deterministic: take the mode instead of a sample
        :return: actions (n_envs, …), values (n_envs, 1), log-probabilities (n_envs,), and the state after the step
        """
        features = self.extract_features(obs)
        latent, state = run_lstm(self.lstm, features, state, episode_starts)
        with unvalidated_if_traced():
            distribution, values = self._heads(latent, features)
            actions = distribution.get_actions(deterministic=deterministic)
            log_prob = distribution.log_prob(actions)
        assert self.action_space.shape is not None
        return actions.reshape((-1, *self.action_space.shape)), values, log_prob, state

    def act(
        self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor, cache: ActivationCache | None = None
    ) -> tuple[th.Tensor, th.Tensor, LstmState]:
        """
        One step without log-probabilities, which acting does not need.

        :param cache: records the step for :meth:`evaluate_actions`
        :return: actions (n_envs, …), values (n_envs, 1), and the state after the step
        """
        if is_overridden(self, LstmActorCriticPolicy, "forward"):
            actions, values, _, state = self.forward(obs, state, episode_starts)
            return actions, values, state
        if cache is None:
            features = self.extract_features(obs)
            latent, state = run_lstm(self.lstm, features, state, episode_starts)
        else:
            features = self.extract_features(obs, cache.extractor)
            latent, state = cache.record(features, state, episode_starts)
        latent_pi, latent_vf = self._latents(latent, features)
        return sample_actions(self, latent_pi), self._value(latent_vf), state

    def _heads(self, latent: th.Tensor, features: th.Tensor | None) -> tuple[Distribution, th.Tensor]:
        """As :meth:`_latents` -> distribution of actions, values (batch, 1)"""
        latent_pi, latent_vf = self._latents(latent, features)
        return self._get_action_dist_from_latent(latent_pi), self._value(latent_vf)

    def _latents(self, latent: th.Tensor, features: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        """Output of the LSTM (batch, lstm_hidden_size), and its input (batch, features_dim) -> inputs of the heads"""
        if self.critic is None:
            latents: tuple[th.Tensor, th.Tensor] = self.mlp_extractor(latent)
            return latents
        return self.mlp_extractor.forward_actor(latent), self.mlp_extractor.forward_critic(self.critic(features))

    def _values(self, latent: th.Tensor, features: th.Tensor | None) -> th.Tensor:
        """Output of the LSTM (batch, lstm_hidden_size), and its input (batch, features_dim) -> (batch, 1)"""
        of_critic = latent if self.critic is None else self.critic(features)
        return self._value(self.mlp_extractor.forward_critic(of_critic))

    def _value(self, latent_vf: th.Tensor) -> th.Tensor:
        """Input of the value head (batch, …) -> (batch, 1), in the units of the rewards"""
        outputs: th.Tensor = self.value_net(latent_vf)
        return outputs if self.value_normalizer is None else self.value_normalizer(outputs)

    def update_value_scale(self, targets: npt.NDArray[np.floating]) -> float:
        """
        Before each update: let the value normalizer take in its value targets.

        :return: the unit in which the loss is to be computed; 1 without a normalizer
        """
        if self.value_normalizer is None:
            return 1.0
        self.value_normalizer.update(targets)
        return self.value_normalizer.mean_and_scale[1]

    def evaluate_actions(  # type: ignore[override]
        self,
        obs: PyTorchObs,
        actions: th.Tensor,
        state: LstmState,
        episode_starts: th.Tensor,
        cache: ChunkCache | None = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Evaluate the actions of a whole rollout, with gradients through time.

        :param obs: (n_steps * n_envs, …)
        :param actions: (n_steps * n_envs, …)
        :param state: state before the first step
        :param episode_starts: (n_steps, n_envs), bool
        :param cache: of these steps, recorded with the current parameters; saves the forward pass
        :return: values (n_steps * n_envs, 1), log-probabilities and entropies (n_steps * n_envs,)
        """
        features: th.Tensor | None
        if cache is None:
            features = self.extract_features(obs)
            latent, _ = run_lstm(self.lstm, features, state, episode_starts)
        else:
            if cache.convolutions is not None:
                features = cache.convolutions.replay()
            elif self.critic is None and isinstance(self.features_extractor, FlattenExtractor):
                features = None  # nothing learns from their gradient
            else:
                features = self.extract_features(obs)
            latent = cache.lstm.replay(features, cache.envs)
        distribution, values = self._heads(latent, features)
        return values, distribution.log_prob(actions), distribution.entropy()

    def predict_values(  # type: ignore[override]
        self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor
    ) -> th.Tensor:
        """:return: values (n_envs, 1)"""
        features = self.extract_features(obs)
        latent, _ = run_lstm(self.lstm, features, state, episode_starts)
        return self._values(latent, features)

    def get_distribution(  # type: ignore[override]
        self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor
    ) -> tuple[Distribution, LstmState]:
        """:return: the distribution of actions, and the state after the step"""
        latent, state = run_lstm(self.lstm, self.extract_features(obs), state, episode_starts)
        with unvalidated_if_traced():
            return self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(latent)), state

    def predict(
        self,
        observation: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        """
        Action for an observation and a hidden state; the calling convention of sb3-contrib's recurrent policies.
        Pass back the state that the last call returned; without ``state`` the policy starts from zeros.

        :param observation: one observation or a batch of them
        :param state: hidden and cell state, each (n_lstm_layers, n_envs, lstm_hidden_size)
        :param episode_start: (n_envs,); where True the state is zeroed first
        :param deterministic: take the mode instead of a sample
        :return: the action(s) and the next state
        """
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        n_envs = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        with th.no_grad():
            before = self.initial_state(n_envs)
            if state is not None:
                before = tuple(th.as_tensor(new).to(zeros) for new, zeros in zip(state, before, strict=True))
            starts = th.zeros(n_envs, dtype=th.bool)
            if episode_start is not None:
                starts = th.as_tensor(np.asarray(episode_start, dtype=bool)).reshape(n_envs)
            distribution, after = self.get_distribution(obs, before, starts.to(self.device))
            actions = distribution.get_actions(deterministic=deterministic).cpu().numpy()
        assert self.action_space.shape is not None
        env_actions = to_env_actions(self, actions.reshape((-1, *self.action_space.shape)))
        if not vectorized:
            env_actions = env_actions.squeeze(axis=0)
        return env_actions, tuple(part.cpu().numpy() for part in after)


class LstmActorCriticCnnPolicy(LstmActorCriticPolicy):
    """
    As :class:`LstmActorCriticPolicy`, for images, with baby-a3c's network: :class:`BabyCNN`, an LSTM of 256 units, linear
    heads. Alias: ``CnnLstmPolicy``.
    """

    default_features_extractor_class = BabyCNN
    default_net_arch = ()
    default_lstm_hidden_size = 256
    default_normalize_values = False
    default_adam_eps = None


class LstmMultiInputActorCriticPolicy(LstmActorCriticPolicy):
    """
    As :class:`LstmActorCriticPolicy`, for dictionaries of observations. Alias: ``MultiInputLstmPolicy``.
    """


MlpLstmPolicy = LstmActorCriticPolicy
CnnLstmPolicy = LstmActorCriticCnnPolicy
MultiInputLstmPolicy = LstmMultiInputActorCriticPolicy
