"""Networks with dynamic connectivity, registered with timm on import."""

from dgnet.models import cifar_resnet as cifar_resnet
from dgnet.models import mobilenetv2 as mobilenetv2
from dgnet.models import randwire as randwire
from dgnet.models import regnet as regnet
from dgnet.models import resnet as resnet
from dgnet.models._connectivity import Connectivity as Connectivity
from dgnet.models._convert import check_agreement as check_agreement
from dgnet.models._convert import convert as convert
from dgnet.models._convert import to_static as to_static
from dgnet.models._converted import Conversion as Conversion
from dgnet.models._converted import ConvertedNetwork as ConvertedNetwork
from dgnet.models._dynamic import DynamicNetwork as DynamicNetwork
from dgnet.models._dynamic import Transform as Transform
from dgnet.models._dynamic import stored_options as stored_options
from dgnet.models._factory import create_model as create_model
from dgnet.models._factory import list_models as list_models
from dgnet.models._increment import Increment as Increment
from dgnet.models._inputs import find_channels as find_channels
from dgnet.models._inputs import find_image_size as find_image_size
from dgnet.models._protocol import TimmNetwork as TimmNetwork
from dgnet.models._state import unwrap_names as unwrap_names
from dgnet.models._static_weights import classifier_prefixes as classifier_prefixes
from dgnet.models._static_weights import is_static as is_static
from dgnet.models._static_weights import load_static_weights as load_static_weights
