from bench.v5e import *
from bench.v5e import hlo as hlo
from bench.v5e import links as links
from bench.v5e import loading as loading
from bench.v5e import overlays as overlays
