from gemma._train import run as run
from gemma._train import step as step
