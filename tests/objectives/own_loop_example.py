import jax
import optax

from music_jax.objectives import music_loss, music_lower_bound


def embed(params, x):  # any function of yours: a Flax module's apply, an Equinox module, ...
    return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def loss_fn(params, views):  # views: [batch, 2, features], two augmentations of each sample
    z = jax.vmap(embed, in_axes=(None, 1), out_axes=1)(params, views)  # [batch, 2, dim]
    return music_loss(z[:, 0], z[:, 1], num_segments=4)  # dim = 4 segments * 8 units


@jax.jit
def train_step(params, opt_state, views):
    loss, gradient = jax.value_and_grad(loss_fn)(params, views)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


keys = jax.random.split(jax.random.key(0), 4)
params = {
    "hidden": 0.3 * jax.random.normal(keys[0], (16, 64)),
    "out": 0.3 * jax.random.normal(keys[1], (64, 32)),
}
samples = jax.random.normal(keys[2], (256, 1, 16))
views = samples + 0.1 * jax.random.normal(keys[3], (256, 2, 16))
optimizer = optax.adam(3e-3)
opt_state = optimizer.init(params)
for _ in range(100):
    params, opt_state, loss = train_step(params, opt_state, views)
print(f"loss {loss:.2f}, lower bound {music_lower_bound(8):.2f}")
