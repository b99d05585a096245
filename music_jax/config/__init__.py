"""The config: fields with their defaults, checks, and config files."""

from music_jax.config.defaults import FREE_FIELDS as FREE_FIELDS
from music_jax.config.defaults import default_config as default_config
from music_jax.config.defaults import descriptions as descriptions
from music_jax.config.defaults import is_free as is_free
from music_jax.config.defaults import set_views as set_views
from music_jax.config.fields import check_values as check_values
from music_jax.config.fields import embedding_size as embedding_size
from music_jax.config.fields import field_names as field_names
from music_jax.config.fields import get_field as get_field
from music_jax.config.fields import is_centered as is_centered
from music_jax.config.fields import unknown_field_message as unknown_field_message
from music_jax.config.fields import validate as validate
from music_jax.config.files import differences as differences
from music_jax.config.files import from_file as from_file
from music_jax.config.files import from_json as from_json
from music_jax.config.files import normalize_path as normalize_path
from music_jax.config.files import shipped_configs as shipped_configs
