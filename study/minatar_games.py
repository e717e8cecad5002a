"""Make MinAtar's games known to Gymnasium (pip install minatar, in study/requirements.txt):

python reinforce_bn.py --env study.minatar_games:MinAtar/Breakout-v1 --network cnn
"""

from minatar.gym import register_envs

register_envs()
