"""Words that names of functions begin with (``test_names.py``)."""

# ruff: noqa: SIM905

VERBS = frozenset(
    """
    accept adapt add adjust adopt advance advise align allow amend analyse analyze announce answer append apply approve
    arrange ask assemble assert assign attach attend average avoid balance be begin bench bind blend break bring
    broadcast build cache calculate calibrate call capture carry cast catch change charge check choose claim clamp
    classify clean clear climb clone close collapse collect combine commit compare compensate compile complete compose
    compress compute concat concatenate configure confirm connect consume continue contract convert copy correct count
    cover create crop cross cut cycle decide declare decode decompress deepen defer define delete dequantize derive
    describe detach detect determine discard discover dispatch display distil distill distribute divide do double
    download draw drop dump duplicate edit embed emit enable encode end enqueue ensure enter enumerate erase escape
    estimate evaluate examine exclude execute exit expand expect explain export express extend extract fail feed fetch
    fill filter find finish fit fix flatten flush fold follow force forget format forward freeze fuse gather generate
    get give go grade group grow guard guess halve handle harden hash have hide hold identify ignore imitate import
    include index infer inform init initialize inline insert inspect install interpolate interpret intersect invert
    invoke isolate iterate join judge keep know label launch lay learn leave legalize let lift limit link list load
    locate lock log look lower make map mark mask match materialize mean measure merge migrate mirror modify monitor
    mount move multiply name need normalize note notice notify number observe offer omit open optimize order own pack
    pad parse partition pass patch pause permute pick pin place plan play point poll pool pop post predict prefill
    prepare present preserve press print probe process produce profile promise propagate protect prove provide prune
    publish pull push put quantize query quote raise rank reach read rebuild recall receive recognize recompute
    reconstruct record recover reduce refer refine refuse register regroup reject relate release reload remain remember
    remove rename render renew reorder repair repeat replace report represent require rescale reset reshape resize
    resolve respond restart restore restrict resume retain retrace return retype reuse reverse reword rewrite rotate
    round route run sample save scale scan scatter schedule scope score search see select send separate serialize serve
    set settle shape shard share shift shorten show shrink sign simplify skip slice smooth solve sort split spoil spool
    stack stage start state step stop store stream stretch strip subtract suggest sum supply support swap switch
    synchronize take tell test tidy tie time touch trace track train transfer transform translate transpose traverse
    trim trust try turn undo unfold unify unpack unwrap update upload use validate verify view visit vote wait walk
    warm warn watch weigh widen work wrap write yield zero
    """.split()
)
PREDICATES = frozenset("is has can may should needs takes holds keeps to from of with without".split())
IRREGULAR = frozenset(
    """
    begun bound broken built chosen divided done drawn driven fallen found frozen given gone grown held hidden kept
    known led left lost made meant met paid said seen sent shown shrunk sought spent spread stood struck taken thought
    told torn understood won wound written
    """.split()
)
"""Participles that do not end in -ed."""
