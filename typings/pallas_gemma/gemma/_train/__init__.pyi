from gemma._train import layout as layout
from gemma._train import mesh as mesh
from gemma._train import run as run
from gemma._train import step as step
